"""The benchmark of rows with different adapters runs, and checks what it times."""

import json

import pytest
import torch

from benchmarks.ops import adapter_rows as benchmark
from qlora_kit.adapters.multi_adapter.batch_rows import BatchRows


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_a_record_of_two_cases(tmp_path, capsys):
    words = ["--cases", "4:1:2", "4:64:4", "--size", "32", "--rank", "2", "--seconds", "0"]
    benchmark.main([*words, "--out", str(tmp_path)])
    assert "<- chosen" in capsys.readouterr().out
    (file,) = (tmp_path / "adapter_rows").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["impl"] for row in rows] == ["base", "one", "masked", "grouped"] * 2
    assert [row["impl"] for row in rows if row["chosen"]] == ["masked", "grouped"]
    benchmark.main([*words, "--limit", "-1", "--out", str(tmp_path)])
    assert "left out" in capsys.readouterr().out


def test_a_wrong_form_is_noticed(monkeypatch):
    real = benchmark.answer
    monkeypatch.setattr(benchmark, "answer", lambda *words: real(*words).roll(1, 0))
    rows, x = BatchRows(["0", "1", "0"]), torch.randn(3, 2, 32)
    with torch.no_grad(), pytest.raises(AssertionError, match="masked"):
        benchmark.check(benchmark.shared(32, 2, 2), x, rows)
