"""Compiling beside other work: what is compiled, once by whoever comes first, and in the end."""

import subprocess
import sys
import threading

import pytest
import torch

from qlora_kit.core.errors import BackendError
from qlora_kit.ops import jit, precompile
from qlora_kit.ops.nf4_linear import cuda

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def compiled(monkeypatch):
    """Files in the order in which they are compiled, by a compiler that does nothing."""
    order = []

    def compile_source(file, architecture):
        order.append(file)
        if file == "wrong.cu":
            raise BackendError("does not compile")

    monkeypatch.setattr(jit, "compile_source", compile_source)
    return order


def test_what_is_needed_follows_the_table_of_strategies():
    for architecture, kind in (("sm_90a", "hopper"), ("sm_80", "other")):
        files = precompile.needed(architecture, torch.bfloat16)
        assert all(jit.is_for(file, architecture) for file in files)
        chosen = {name for (k, _), table in cuda.ROWS.items() for _, name in table if k == kind}
        for name in ("gemv", "hopper", "ahead", "small_m", "portable"):
            served = any(f"/{name}/" in file or f"/{name}.cu" in file for file in files)
            assert served == (name in chosen), (architecture, name)


@pytest.mark.parametrize(
    ("architecture", "forced_only"),
    [
        ("sm_90a", {"nf4_linear/portable.cu", "nf4_linear/small_m.cu"}),
        (
            "sm_80",
            {
                f"nf4_linear/{name}.cu"
                for dtype in ("bfloat16", "float16")
                for name in (f"gemv/{dtype}", f"low_rank/{dtype}_16")
            },
        ),
    ],
)
def test_every_source_is_some_models(architecture, forced_only):
    """But for strategies that serve this architecture only where they are forced."""
    found = set()
    for dtype in DTYPES:
        files = precompile.needed(architecture, dtype)
        name = str(dtype).removeprefix("torch.")
        stems = {file.rsplit("/", 1)[1].split(".")[0].split("_")[0] for file in files}
        assert stems & {"bfloat16", "float16", "float32"} == {name}
        assert {"nf4_quantize/nf4_quantize.cu", f"rms_norm/{name}.cu"} <= set(files)
        found |= set(files)
    every = {file for file in jit.source_files() if jit.is_for(file, architecture)}
    assert every - found == forced_only
    assert found <= every


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_threads_compile_everything_and_leave_errors_to_who_wants_the_kernel(
    compiled, monkeypatch, cores
):
    monkeypatch.setattr(precompile, "usable_cores", lambda: cores)
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    files = ["one.cu", "wrong.cu", "two.cu", "three.cu"]
    threads = precompile.compile_beside(files, "sm_80")
    for thread in threads:
        thread.join()
    assert len(threads) == max(1, cores // 2)
    assert sorted(compiled) == sorted(files)
    assert compiled == files or cores > 2
    assert not failures


@pytest.fixture
def _not_begun():
    precompile._begin_once.cache_clear()
    yield
    precompile._begin_once.cache_clear()


@pytest.mark.usefixtures("_not_begun")
@pytest.mark.parametrize(
    ("device", "capability", "rank", "begins"),
    [
        ("cuda", (8, 0), None, True),
        ("cuda", (8, 0), "0", True),
        ("cuda", (8, 0), "1", False),  # another process of this host does
        ("cuda", (7, 5), None, False),  # kernels do not run there
        ("cpu", (8, 0), None, False),
    ],
)
def test_a_model_begins_it_once(compiled, monkeypatch, device, capability, rank, begins):
    monkeypatch.setattr(jit, "is_available", lambda: True)
    monkeypatch.setattr(jit, "architecture_of", lambda device: "sm_80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", rank)
    for _ in "ab":
        precompile.begin(torch.device(device), torch.bfloat16)
    for thread in threading.enumerate():
        if thread.name == "qlora-kit-compile":
            thread.join()
    wanted = precompile.needed("sm_80", torch.bfloat16) if begins else []
    assert sorted(compiled) == sorted(wanted)


def test_a_process_ends_without_what_nobody_has_begun():
    script = (
        "import os, threading, time\n"
        "from qlora_kit.ops import jit, precompile\n"
        "begun = threading.Event()\n"
        "def slow(file, architecture):\n"
        "    begun.set()\n"
        "    os.write(1, f'{file}\\n'.encode())\n"
        "    time.sleep(0.3)\n"
        "    os.write(1, f'done {file}\\n'.encode())\n"
        "precompile.usable_cores = lambda: 16\n"
        "jit.compile_source = slow\n"
        "precompile.compile_beside([f'{i}.cu' for i in range(5000)], 'sm_80')\n"
        "assert begun.wait(50)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stdout.splitlines()
    begun = [line for line in lines if not line.startswith("done")]
    assert 1 <= len(begun) < 500
    assert sorted(lines) == sorted([*begun, *(f"done {file}" for file in begun)])
    assert "Traceback" not in done.stderr


def test_who_wants_what_another_compiles_waits_and_finds_it(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    file = "nf4_scales/nf4_scales.cu"
    said, codes = [], []

    def want():
        code, log = jit.compile_source(file, "sm_80")
        said.append(log)
        codes.append(bytes(code.code))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(bool, said)) == [False, False, False, True]  # one compiled
    assert len(set(codes)) == 1
