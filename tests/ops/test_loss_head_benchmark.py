"""The benchmark of the loss head at sizes a CPU can take: it checks, measures, records."""

import json
import sys

import pytest
import torch

from benchmarks.ops import loss_head as benchmark
from benchmarks.ops import nf4_dequantize


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")
def test_it_measures_and_records(monkeypatch, tmp_path, capsys):
    arguments = ["loss_head", "--seconds", "0.01", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(nf4_dequantize, "L2_BYTES", 1)
    benchmark.main()
    (file,) = tmp_path.rglob("*.json")
    rows = json.loads(file.read_text())["rows"]
    heads = [row["impl"] for row in rows if row["op"] == "head"]
    assert len(heads) == len(set(heads)) == 7
    assert {"all logits", "plain torch, same chunks", "ours, NF4 head"} < set(heads)
    assert sum("(chosen)" in name for name in heads) == 1
    assert {row["impl"] for row in rows if row["op"] != "head"} == {
        "ours",
        "capped",
        "losses only",
        "copy",
    }
    assert all(row["ms_median"] > 0 for row in rows)
    assert "of a copy" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed():
    problem = benchmark.Problem(40, 64, 100)
    steps = benchmark.variants(problem, [16])
    benchmark.check(problem, steps)
    steps["ours, chunks of 16"] = lambda: 1.055 * problem.full()
    with pytest.raises(AssertionError, match="ours, chunks of 16: gradient off by 5"):
        benchmark.check(problem, steps)
