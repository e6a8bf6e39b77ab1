"""The doctor's words on kernels: what compiles, what is not tested, and that wrong answers show."""

from types import SimpleNamespace

import pytest
import torch

from qlora_kit.cli import kernel_checks, selftest
from qlora_kit.cli.main import main
from qlora_kit.core.errors import BackendError
from qlora_kit.ops import jit
from qlora_kit.ops.nf4_linear import cuda, reference

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says other things with a GPU")
SOURCE = "nf4_dequantize/layouts.cu"


def statuses(checks):
    return [check.status for check in checks]


@WITHOUT_GPU
def test_without_a_gpu_every_source_and_strategy_is_named_as_not_tested(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for file in jit.source_files():
        (line,) = (line for line in lines if file in line)
        assert line.startswith("  note")
        assert "not compiled, not tested: no CUDA GPU here" in line
    (line,) = (line for line in lines if "strategies" in line)
    assert line.startswith("  note")
    assert all(name in line for name in cuda.STRATEGIES)
    assert "# registers and shared memory" not in lines  # nothing to say, no heading


def test_names_of_kernels_are_those_the_compiler_names():
    pytest.importorskip("cuda.bindings.nvrtc")
    code, log = jit.compile_source(SOURCE, "sm_90a", use_cache=False)
    named = sorted(part.split("'")[1] for part in log.split("Compiling entry function ")[1:])
    assert kernel_checks._kernel_names(code) == named
    assert len(named) == 6


def test_compiling_and_reading_from_the_cache_are_told_apart(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    monkeypatch.setattr(jit, "architecture_of", lambda device: "sm_80")
    first = kernel_checks._compiled(SOURCE)
    again = kernel_checks._compiled(SOURCE)
    assert first.status == again.status == "ok"
    assert first.found.startswith("sm_80, 6 kernels, compiled in ")
    assert again.found.startswith("sm_80, 6 kernels, from the cache in ")
    assert jit.COMPILATIONS[SOURCE].seconds < 5
    cache = kernel_checks._cache(jit.cache_folder())
    assert str(tmp_path) in cache.found
    assert "0 B" not in cache.found


def test_a_source_that_does_not_compile_is_a_failure(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    monkeypatch.setattr(jit, "architecture_of", lambda device: "sm_80")
    monkeypatch.setattr(jit, "source_text", lambda file: "not CUDA")
    check = kernel_checks._compiled(SOURCE)
    assert check.status == "FAIL"
    assert f"{SOURCE} does not compile for sm_80" in check.found


def test_what_stops_and_what_serves_nothing_are_said():
    def stops():
        yield "forward", 0.0, 1.0
        raise BackendError("no memory")

    checks = list(kernel_checks._tests("some", stops()))
    assert statuses(checks) == ["ok", "FAIL"]
    assert checks[1].found == "stopped: no memory"
    (check,) = kernel_checks._tests("some", iter(()))
    assert "not tested" in check.found


def test_nan_is_a_failure():
    (check,) = kernel_checks._tests("some", iter([("forward", float("nan"), 1.0)]))
    assert check.status == "FAIL"


def strategy(factor):
    """A strategy in plain torch, right for a factor of 1."""
    return SimpleNamespace(
        serves=lambda x, weight: x.shape[0] > 1,
        multiply=lambda x, weight, bias, xa, b: (
            factor * reference.product(x, weight.dequantize(x.dtype).T, bias, xa, b.T)
        ),
        multiply_transposed=lambda dy, weight, dyb, a: (
            factor * reference.product(dy, weight.dequantize(dy.dtype), None, dyb, a)
        ),
    )


@pytest.mark.parametrize(("factor", "wanted"), [(1.0, {"ok"}), (1.05, {"FAIL"})])
def test_the_self_test_tells_right_strategies_from_wrong_ones(monkeypatch, factor, wanted):
    monkeypatch.setitem(cuda.STRATEGIES, "plain", strategy(factor))
    errors = selftest.strategy_errors("plain", torch.device("cpu"))
    checks = list(kernel_checks._tests("plain", errors))
    assert set(statuses(checks)) == wanted
    assert len(checks) == 2 * 2 * 5  # two dtypes, two products, rows but the one it does not serve


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("nf4_quantize", lambda packed, absmax: (packed ^ 1, absmax)),
        ("nf4_quantize", lambda packed, absmax: (packed, absmax * (1 + 2**-23))),
        ("nf4_quantize_absmax", lambda codes, nested, offset: (codes ^ 1, nested, offset)),
    ],
)
def test_the_self_test_finds_one_wrong_bit(monkeypatch, name, wrong):
    right = getattr(selftest, name)
    monkeypatch.setattr(selftest, name, lambda *a, **k: wrong(*right(*a, **k)))
    failed = [check for check in kernel_checks.check_ops() if check.status == "FAIL"]
    assert failed
    assert all("bit for bit" in check.found for check in failed)


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_compiled_tested_and_measured(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "not compiled" not in text
    assert "registers, " in text
    assert "of local memory" not in text
    for name in cuda.STRATEGIES:
        assert f"    {name} " in text
