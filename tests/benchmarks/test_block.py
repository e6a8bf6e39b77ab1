"""The benchmark of decoder layers runs, and its paths agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.block import methods, paths
from qlora_kit.adapters.adalora.layer import AdaLoRALinear
from qlora_kit.adapters.lora.layer import FusibleLinear
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import TINY
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.quant.config import QuantConfig


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
        assert row["error"] <= methods.MOST_OVER_OWN * row["own_error"] < 0.03
        assert (row["over_lora"] == 1.0) or row["method"] != "lora"


def _a_tenth_more(piece: AdaLoRALinear, *given: torch.Tensor) -> list[torch.Tensor | None]:
    """AdaLoRA's, with λ a tenth too large."""
    of_q, of_values, of_p = _ADALORA(piece, *given)
    assert of_values is not None
    return [of_q, 1.1 * of_values, of_p]


def _without_scale(piece: FusibleLinear, d_a: torch.Tensor, *given: Any) -> list[Any]:
    """LoRA's, with s left out of A's."""
    return _LORA(piece, d_a / piece.scale, *given)


_ADALORA, _LORA = AdaLoRALinear.pull_back, FusibleLinear.pull_back
WRONG = {
    "lora_E is": (AdaLoRALinear, _a_tenth_more, "lora: lora_A"),
    "lora is wrong: lora_A is": (FusibleLinear, _without_scale, ""),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_method_is_not_timed(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gradients that float32 does not have end the benchmark."""
    owner, wrong, before = WRONG[said]
    monkeypatch.setattr(owner, "pull_back", wrong)
    with pytest.raises(SystemExit, match=said):
        methods.main(["--layers", "1", "--rounds", "1"])
    assert before in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_a_model_that_drowns_in_rounding_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of 8B does whose random codes have a mean: the check says so and stops."""
    monkeypatch.setattr(methods, "MOST_OWN_ERROR", 1e-4)
    with pytest.raises(SystemExit, match="own code is too far from float32"):
        methods.main(["--layers", "1", "--rounds", "1"])


def test_codes_without_a_mean() -> None:
    """Of the layers' weights: 5% of their deviation as drawn, a tenth of that once centred."""
    model = random_model(TINY, QuantConfig(), device="cpu", dtype=torch.float32)
    found = []
    for _ in range(2):
        linears = [m for m in model.modules() if isinstance(m, NF4Linear)]
        weights = torch.cat([m.dequantize().flatten() for m in linears])
        found.append(float(weights.mean() / weights.std()))
        paths.centre(model)
    drawn = 4 * weights.numel() ** -0.5
    assert found[0] > 0.04
    assert abs(found[1]) < 0.005 + drawn
