"""The benchmark of long rows runs on a tiny model, and out of memory is a row."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.context import __main__ as command
from benchmarks.context import child, spike
from qlora_kit.bench.subject import Stage

FIELDS = {"model", "cap_gib", "rank", "longest_trained", "tokens_per_s"}
"""Of the record's contract."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_tiny_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, with everything that saves memory."""
    options = ["--quantize-head", "--embeddings-on-host", "--optimizer", "paged_adamw_8bit"]
    options += ["--lengths", "96", "40", "--tile", "32", "--rank", "4", "--layers", "1"]
    assert command.main([*options, "--out", str(tmp_path)]) == 0
    (file,) = (tmp_path / "context").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["length"] for row in rows] == [40, 96]
    assert all(row.keys() >= FIELDS and row["trained"] and row["loss"] > 0 for row in rows)
    assert {row["longest_trained"] for row in rows} == {96}
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other errors are not."""
    case = command.case_of(command.parse(["--lengths", "40", "--tile", "off"]), 40)
    assert case.tile is None

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(child, "update", fail)
    row = child.run(case, Stage())
    assert (row["oom"], row["trained"]) == (True, False)
    assert "out of memory" in command.table([row])

    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(child, "update", broken)
    with pytest.raises(RuntimeError, match="do not fit"):
        child.run(case, Stage())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_a_stream_with_long_rows(tmp_path: Path) -> None:
    """Both optimizers come through where there is memory."""
    assert spike.main(["--out", str(tmp_path)]) == 0
    (file,) = (tmp_path / "paging").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["optimizer"] for row in rows] == list(spike.OPTIMIZERS)
    assert all(row["survived"] == row["tried"] == len(row["lengths"]) for row in rows)
