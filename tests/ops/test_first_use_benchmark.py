"""The benchmark of first uses: which sources it compiles, and that it compiles and caches them."""

import os

import pytest

from benchmarks.ops import first_use as benchmark
from qlora_kit.ops import jit


def test_dtypes_have_sources_of_their_own():
    files, others = (set(benchmark.sources("sm_90a", dtype)) for dtype in ("bfloat16", "float16"))
    assert len(files) == len(others) > len(files & others) > 0
    assert not any("float16_" in file.replace("bfloat16_", "") for file in files)
    assert files | others <= set(jit.source_files())
    assert {file.split("/")[0] for file in files} == {
        "low_rank_gradients",
        "nf4_dequantize",
        "nf4_linear",
    }


def test_it_compiles_once_and_reads_its_own_cache(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    file = "nf4_linear/hopper/low_rank.cu"
    ((first, cached),) = benchmark.measure([file], "sm_90a").values()
    assert 0 < cached < first
    assert cached < benchmark.measure_beside([file], "sm_90a") < 10 * first
    assert os.environ["QLORA_KIT_CACHE"] == str(tmp_path)
    assert not list(tmp_path.iterdir())
