"""The benchmark of decoder layers runs, and its paths agree."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.block import methods, paths
from qlora_kit.adapters.adalora import AdaLoRALinear


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_methods_take_turns(tmp_path: Path) -> None:
    """A row per method and policy, each checked first, and LoRA beside itself."""
    methods.main(["--layers", "1", "--rounds", "2", "--out", str(tmp_path)])
    (file,) = (tmp_path / "block_methods").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    found = [(row["policy"], row["method"]) for row in rows]
    wanted = [(policy, method) for policy in methods.POLICIES for method in methods.METHODS]
    wanted.insert(len(methods.METHODS), (methods.POLICIES[0], methods.OWN_CODE))
    assert found == wanted
    for row in rows:
        assert row["rounds"] == 2
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        assert row["error"] < 0.02
        assert (row["over_lora"] == 1.0) or row["method"] != "lora"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_a_wrong_method_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that the model's own code does not have end the benchmark."""
    own = AdaLoRALinear.pull_back

    def wrong(piece: AdaLoRALinear, *given: object) -> list[torch.Tensor | None]:
        of_q, of_values, of_p = own(piece, *given)  # type: ignore[arg-type]
        assert of_values is not None
        return [of_q, 1.1 * of_values, of_p]

    monkeypatch.setattr(AdaLoRALinear, "pull_back", wrong)
    with pytest.raises(SystemExit, match="lora_E is"):
        methods.main(["--layers", "1", "--rounds", "1"])
