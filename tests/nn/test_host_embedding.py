"""Embeddings in host memory give the model's own rows, stay where they are, and are saved."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import ConfigError
from qlora_kit.nn import host_embedding
from qlora_kit.nn.host_embedding import (
    HostEmbedding,
    has_host_embeddings,
    keep_embeddings_on_host,
)
from tests import tiny_models


def build(family: str = "llama", **changes: object) -> PreTrainedModel:
    """A frozen model whose head is its own."""
    changes.setdefault("tie_word_embeddings", False)
    return tiny_models.build(family, **changes).requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_the_models_logits_are_the_same_bits(family: str, dtype: torch.dtype) -> None:
    """Gemma scales its embeddings, each generation in another place; another row is found."""
    model = build(family, dtype=dtype)
    ids = tiny_models.tokens(2, 9)
    wanted = model(ids).logits
    kept = keep_embeddings_on_host(model)
    assert model.get_input_embeddings() is kept
    assert has_host_embeddings(model)
    assert torch.equal(model(ids).logits, wanted)
    kept.weight[ids[0, 0]] += 1
    assert not torch.equal(model(ids).logits, wanted)


def test_rows_are_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way they go to a GPU, an odd remainder at the end."""
    monkeypatch.setattr(host_embedding, "ROWS_AT_A_TIME", 4)
    table = HostEmbedding(torch.randn(11, 8))
    ids = torch.randint(0, 11, (3, 5))
    assert torch.equal(table._send(ids), table.weight[ids])


def test_the_device_stays_and_the_dtype_changes() -> None:
    """The model's device is that of its first parameter: the table is none."""
    model = build()
    table = keep_embeddings_on_host(model)
    assert "weight" not in dict(table.named_parameters())
    model.to("meta")
    assert model.device.type == "meta"
    assert table.weight.device.type == "cpu"
    model.to(torch.bfloat16)
    assert table.weight.dtype == torch.bfloat16


def test_the_state_dict_stays() -> None:
    """The same names and values, and they can be loaded again."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    keep_embeddings_on_host(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.get_input_embeddings().weight.zero_()
    model.load_state_dict(before)
    assert torch.equal(model.get_input_embeddings().weight, before["model.embed_tokens.weight"])


def test_generation() -> None:
    """Answers are the same tokens."""
    model = build()
    ids = tiny_models.tokens(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, **options)
    keep_embeddings_on_host(model)
    assert torch.equal(model.generate(ids, **options), wanted)


def test_doing_it_again_changes_nothing() -> None:
    model = build()
    assert keep_embeddings_on_host(model) is keep_embeddings_on_host(model)


def _trained(model: PreTrainedModel) -> None:
    model.get_input_embeddings().requires_grad_()


def _bounded(model: PreTrainedModel) -> None:
    model.get_input_embeddings().max_norm = 1.0


class _Other(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).relu()


def _other(model: PreTrainedModel) -> None:
    model.set_input_embeddings(_Other(256, 64).requires_grad_(False))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_trained, "they are trained"), (_bounded, "a Embedding"), (_other, "a _Other")],
)
def test_what_cannot_be_moved_is_refused(change: object, reason: str) -> None:
    """And the model is left as it was."""
    model = build()
    change(model)  # type: ignore[operator]
    before = model.get_input_embeddings()
    with pytest.raises(ConfigError, match=reason):
        keep_embeddings_on_host(model)
    assert model.get_input_embeddings() is before


def test_tied_embeddings_are_refused() -> None:
    """The head needs them on the GPU."""
    with pytest.raises(ConfigError, match="also the weight of the head"):
        keep_embeddings_on_host(build(tie_word_embeddings=True))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would have to agree on a tensor that no collective can reach."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several processes"):
        keep_embeddings_on_host(build())


@pytest.mark.gpu
def test_lookups_from_a_gpu() -> None:
    """Rows arrive as they are, more of them than go at a time."""
    table = HostEmbedding(torch.randn(1000, 64, dtype=torch.bfloat16))
    ids = torch.randint(0, 1000, (2, 20_000), device="cuda")
    found = table(ids)
    assert found.device == ids.device
    assert torch.equal(found.cpu(), table.weight[ids.cpu()])
    assert table.to("cuda").weight.device.type == "cpu"


def test_nothing_keeps_the_table_where_it_was() -> None:
    """An adapter that was there before, as in a run, holds no second copy on the GPU."""
    model = tiny_models.build("llama", tie_word_embeddings=False)
    adapter = attach(model, LoRA(rank=2))
    before = weakref.ref(model.get_input_embeddings().weight)
    norm = model.model.norm.weight
    assert before() is not None
    keep_embeddings_on_host(model)
    gc.collect()
    assert before() is None
    assert not norm.requires_grad
    adapter.detach_from_model()  # what is still there is trained again
    assert norm.requires_grad
