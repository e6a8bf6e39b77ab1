"""An adapter alone: complete, readable by PEFT, nothing else beside it."""

import json

import pytest
import torch

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import FormatError, SourceError
from qlora_kit.export.adapter import export_adapter
from tests import tiny_models
from tests.export.models import train_adapter


@pytest.fixture
def folder(tmp_path):
    adapter = tmp_path / "run"
    config = LoRA(rank=4, alpha=8.0, rslora=True, rank_pattern={"q_proj": 9})
    train_adapter(tiny_models.saved("llama"), adapter, config=config)
    tiny_models.tokenizer(adapter)
    (adapter / "optimizer.pt").write_bytes(b"x")
    (adapter / "checkpoint-5").mkdir()
    return adapter


def test_only_the_adapter_and_its_tokenizer_are_taken(folder, tmp_path):
    out = export_adapter(folder, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "qlora_kit.json"} <= names
    assert "tokenizer.json" in names
    assert not names & {"optimizer.pt", "checkpoint-5"}
    before, after = read_adapter(folder), read_adapter(out)
    assert after.config == before.config
    assert after.base == before.base
    for name, pair in before.deltas.items():
        assert torch.equal(after.deltas[name].delta(), pair.delta())


def test_plain_scale_gives_the_same_change_without_rslora(folder, tmp_path):
    out = export_adapter(folder, tmp_path / "out", plain_scale=True)
    assert not json.loads((out / "adapter_config.json").read_text())["use_rslora"]
    before, after = read_adapter(folder), read_adapter(out)
    for name, pair in before.deltas.items():
        assert after.deltas[name].scale == pytest.approx(pair.scale)
    assert {round(pair.scale, 6) for pair in after.deltas.values()} == {4.0, round(8 / 3, 6)}


def test_damage_is_found_here(folder, tmp_path):
    with pytest.raises(SourceError, match="not an adapter folder"):
        export_adapter(tmp_path / "none", tmp_path / "out")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        export_adapter(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
