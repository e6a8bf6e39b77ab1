"""Every kernel compiles for every architecture, without a GPU, and spills nothing."""

import ctypes
import json
import re
from pathlib import Path

import pytest
import torch

from qlora_kit.core.errors import BackendError
from qlora_kit.ops import jit, launch

pytest.importorskip("cuda.bindings.nvrtc")

SOURCES = sorted(
    str(path.relative_to(jit.kernels_folder())) for path in jit.kernels_folder().rglob("*.cu")
)


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, shared memory and spilled bytes of each kernel, from the compiler's output."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        spills = [int(number) for number in re.findall(r"(\d+) bytes spill", part)]
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = {
            "registers": int(registers[1]) if registers else -1,
            "shared_bytes": int(shared[1]) if shared else 0,
            "spilled_bytes": sum(spills),
        }
    return found


@pytest.mark.parametrize(
    ("file", "architecture"),
    [(file, name) for file in SOURCES for name in jit.ARCHITECTURES if jit.is_for(file, name)],
)
def test_every_kernel_compiles_without_spills(file, architecture, record_property):
    code, log = jit.compile_source(file, architecture, use_cache=False)
    found = resources(log)
    record_property("resources", json.dumps(found))
    assert len(bytes(code.code)) > 0
    assert found
    for name, used in found.items():
        assert 0 < used["registers"] <= 255, name
        assert used["spilled_bytes"] == 0, f"{name} spills on {architecture}"


def test_spills_are_read_from_the_compilers_words():
    log = (
        "ptxas info : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas . 8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info : Used 255 registers, used 1 barriers, 3072 bytes smem\n"
    )
    assert resources(log)["k"] == {"registers": 255, "shared_bytes": 3072, "spilled_bytes": 40}


def test_tables_in_the_source_are_generated_exactly():
    text = jit.source_text(SOURCES[0])
    values = re.search(r"NF4_VALUES\[16\] = \{(.*?)\}", text)
    numbers = [float.fromhex(value.strip().removesuffix("f")) for value in values[1].split(",")]
    assert tuple(numbers) == jit.NF4_VALUES


def test_sources_hold_no_table_of_their_own():
    for file in jit.kernels_folder().rglob("*.cu*"):
        assert "0.69619" not in file.read_text()


def test_a_missing_kernels_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(jit.resources, "files", lambda name: tmp_path)
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "a" / "b" / "jit.py"))
    jit.kernels_folder.cache_clear()
    try:
        with pytest.raises(BackendError, match="built without kernels"):
            jit.kernels_folder()
    finally:
        monkeypatch.undo()
        jit.kernels_folder.cache_clear()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    assert jit.cache_folder() == tmp_path / "kernels"
    monkeypatch.delenv("QLORA_KIT_CACHE")
    assert jit.cache_folder() == Path.home() / ".cache" / "qlora_kit" / "kernels"


def test_a_cached_binary_is_reused(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    first, _ = jit.compile_source(SOURCES[0], "sm_80")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.read_bytes() == bytes(first.code) for path in files)
    again, said = jit.compile_source(SOURCES[0], "sm_80")
    assert said == ""  # nothing was compiled
    assert bytes(first.code) == bytes(again.code)


@pytest.mark.parametrize(("version", "threads"), [((12, 4), None), ((12, 8), 0), ((13, 0), 0)])
def test_kernels_are_compiled_side_by_side_where_the_compiler_can(monkeypatch, version, threads):
    from cuda.bindings import nvrtc

    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, *version))
    jit._threads.cache_clear()
    assert jit._threads() == threads
    monkeypatch.undo()
    jit._threads.cache_clear()


def test_arguments_keep_their_width():
    """Kernels read addresses and integers as 64 bits, floats as 32."""
    from cuda.core._kernel_arg_handler import ParamHolder

    tensor = torch.zeros(4)
    values = (tensor, None, 2**40, True, -1, 0.5)
    passed = tuple(launch._argument(value) for value in values)
    assert [type(value).__name__ for value in passed] == ["int"] * 5 + ["float32"]
    holder = ParamHolder(passed)  # owns what its addresses point at
    addresses = ctypes.cast(holder.ptr, ctypes.POINTER(ctypes.c_void_p))
    wide = [ctypes.c_int64.from_address(addresses[i]).value for i in range(5)]
    assert wide == [tensor.data_ptr(), 0, 2**40, 1, -1]
    assert ctypes.c_float.from_address(addresses[5]).value == 0.5
