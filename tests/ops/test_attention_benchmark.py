"""The benchmark of attention at sizes a CPU can take: it reads shapes, measures and records."""

import json
import sys

import pytest
import torch

from benchmarks.ops import attention as benchmark
from benchmarks.ops.attention import Shape

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")


def test_a_shape_is_read():
    shape = Shape.parse("2x8x4x2x16")
    assert (shape.batch, shape.tokens, shape.heads, shape.kv_heads) == (2, 8, 4, 2)
    assert shape.documents() is None
    assert shape.flops("forward") == 2 * 2 * 2 * (8 * 9 / 2) * 4 * 16
    assert shape.flops("backward") == 2.5 * shape.flops("forward")
    packed = Shape.parse("1x100x4x2x16:4")
    assert packed.lengths == (10, 20, 30, 40)
    assert packed.documents().starts.tolist() == [0, 10, 30, 60, 100]
    assert Shape.parse("2x100x4x2x16:4=").lengths == (25,) * 8
    q, k, v, dout = packed.tensors()
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert (q.shape, k.shape, dout.is_contiguous()) == ((1, 100, 4, 16), (1, 100, 2, 16), True)


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(benchmark, "AGREEMENT", 1e-6)
    with pytest.raises(AssertionError, match=r"cpu is 0\.0.* from chunked"):
        benchmark.variants(Shape.parse("1x32x4x2x16"), 1)


@CPU_ONLY
def test_it_measures_and_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    shapes = ["1x16x4x2x16", "1x16x4x2x16:3"]
    arguments = ["attention", "--shapes", *shapes, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()
    printed = capsys.readouterr().out
    assert "chosen automatically: cpu" in printed
    (file,) = tmp_path.rglob("*.json")
    record = json.loads(file.read_text())
    assert record["bench"] == "attention"
    seen = {(row["impl"], row["pass"], bool(row["documents"])) for row in record["rows"]}
    assert len(seen) == 8
    assert all(row["ms_median"] > 0 for row in record["rows"])
