"""The benchmark of first uses: which sources it compiles, and that it compiles and caches them."""

import os

import pytest

from benchmarks.ops import first_use as benchmark
from qlora_kit.ops import jit
from qlora_kit.ops.nf4_linear import cuda


def test_each_strategy_that_is_served_is_compiled():
    """And no other: of Hopper's table and of the others', by the folders' names."""
    files = benchmark.sources("sm_90a", "bfloat16")
    chosen = {
        name for (kind, _), table in cuda.ROWS.items() for _, name in table if kind == "hopper"
    }
    for name in ("gemv", "hopper", "ahead", "small_m", "portable"):
        assert any(f"/{name}/" in file or f"/{name}.cu" in file for file in files) == (
            name in chosen
        )
    older = benchmark.sources("sm_80", "bfloat16")
    assert {file for file in older if file.startswith("nf4_linear/")} == {
        "nf4_linear/small_m.cu",
        "nf4_linear/portable.cu",
    }
    assert all(jit.is_for(file, "sm_80") for file in older)


def test_dtypes_have_sources_of_their_own():
    files, others = (set(benchmark.sources("sm_90a", dtype)) for dtype in ("bfloat16", "float16"))
    assert len(files) == len(others) > len(files & others) > 0
    assert not any("float16_" in file.replace("bfloat16_", "") for file in files)
    assert files | others <= set(jit.source_files())


@pytest.mark.skipif(not jit.is_available(), reason="needs NVRTC")
def test_it_compiles_once_and_reads_its_own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    file = "nf4_linear/hopper/low_rank.cu"
    ((first, cached),) = benchmark.measure([file], "sm_90a").values()
    assert 0 < cached < first
    assert os.environ["QLORA_KIT_CACHE"] == str(tmp_path)
    assert not list(tmp_path.iterdir())
