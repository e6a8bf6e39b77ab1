"""The benchmark of decoder layers runs, and its paths agree."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.block import paths


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_paths_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny model: every path has a row, and gradients are a few roundings apart."""
    paths.main(["--layers", "1", "--without-compiled", "--out", str(tmp_path)])
    assert "without compiled layers: asked for" in capsys.readouterr().out
    (file,) = (tmp_path / "block_paths").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["path"] for row in rows[:3]] == ["eager", "eager", "fused"]
    assert len({(row["path"], row["policy"]) for row in rows}) == len(rows)
    assert all(row["error"] < 0.02 and row["ms_median"] > 0 for row in rows)
