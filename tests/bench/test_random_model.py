"""Random models: everything is there, nothing is left on the meta device, constants are right."""

from copy import copy

import pytest
import torch

from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import SHAPES, TINY
from qlora_kit.quant.config import QuantConfig


@pytest.mark.parametrize("name", sorted({name for name in SHAPES if name != "tiny"}))
@pytest.mark.parametrize("quant", [QuantConfig(), None])
def test_all_of_it_is_there(name, quant):
    config = copy(SHAPES[name])
    config.num_hidden_layers, config.vocab_size = 2, 96
    config.hidden_size, config.intermediate_size = 128, 256
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    model = random_model(config, quant, device="cpu", dtype=torch.float32)
    assert not [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    assert not [key for key, buffer in model.named_buffers() if buffer.is_meta]
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    if name.startswith("Gemma"):
        assert float(model.model.embed_tokens.embed_scale) == pytest.approx(128**0.5)
    assert model.model.embed_tokens.weight.std() == pytest.approx(0.02, rel=0.1)


def test_what_a_model_is_told_stays_with_it():
    """A prefix left its attention to all models that were made of the same shape after it."""
    before = TINY._attn_implementation
    model = random_model(TINY, None, device="cpu", dtype=torch.float32)
    model.set_attn_implementation("eager")
    assert model.config is not TINY
    assert TINY._attn_implementation == before != "eager"
