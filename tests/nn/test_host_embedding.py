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
    base_dtype,
    keep_embeddings_on_host,
    lookup_waits,
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
    assert lookup_waits(model)  # on a CPU
    assert torch.equal(model(ids).logits, wanted)
    kept.weight[ids[0, 0]] += 1
    assert not torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_the_bases(dtype: torch.dtype) -> None:
    """An adapter's float32 comes first where the table is no parameter."""
    model = build(dtype=dtype)
    attach(model, LoRA(rank=2))
    assert base_dtype(model) == model.dtype == dtype
    keep_embeddings_on_host(model)
    assert base_dtype(model) == dtype
    assert model.dtype == torch.float32


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
@pytest.mark.parametrize("width", [64, 60])
def test_lookups_from_a_gpu(width: int) -> None:
    """Rows arrive as they are, more of them than go at a time where they are sent."""
    table = HostEmbedding(torch.randn(1000, width, dtype=torch.bfloat16))
    ids = torch.randint(0, 1000, (2, 20_000), device="cuda")
    found = table(ids)
    assert table.waits(ids) == (width == 60)
    assert found.device == ids.device
    assert torch.equal(found.cpu(), table.weight[ids.cpu()])
    assert table.to("cuda").weight.device.type == "cpu"


class Gpu:
    """Stands for a GPU's kernel: ids of the meta device are a GPU's, memory is locked in name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.locked: list[torch.Tensor] = []
        self.error = error
        self.like = torch.empty(1, device="meta")
        replaced = {
            "never_waits": lambda table, like: like.is_meta,
            "is_readable": lambda table: any(table is one for one in self.locked),
            "pinned_copy": self._copy,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(host_embedding, name, function)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def _copy(self, source: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        self.locked.append(source.clone())
        return self.locked[-1]


def test_the_table_is_locked_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was locked is another tensor of the same name and values; a copy locks its own."""
    gpu = Gpu(monkeypatch)
    table = HostEmbedding(torch.randn(11, 8))
    before = table.weight
    assert not gpu.locked
    assert table.waits(torch.empty(1))
    assert table.weight is before
    with torch.inference_mode():
        assert not table.waits(gpu.like)
    assert not table.waits(gpu.like)
    assert len(gpu.locked) == 1
    assert table.weight is gpu.locked[0]
    assert not table.weight.is_inference()
    assert torch.equal(table.state_dict()["weight"], before)
    twin = copy.deepcopy(table)
    assert not twin.waits(gpu.like)
    assert len(gpu.locked) == 2
    assert twin.weight is gpu.locked[1]
    table.to(torch.bfloat16)
    assert not table.waits(gpu.like)
    assert table.weight is gpu.locked[2]
    assert torch.equal(table.weight, before.bfloat16())


def test_nothing_is_locked_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA forbids it then; the next lookup outside does."""
    gpu = Gpu(monkeypatch)
    table = HostEmbedding(torch.randn(11, 8))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert table.waits(gpu.like)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not table.waits(gpu.like)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), OSError()])
def test_memory_that_is_not_locked_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The log says so; rows go the way that waits."""
    gpu = Gpu(monkeypatch, error)
    table = HostEmbedding(torch.randn(11, 8))
    before = table.weight
    with caplog.at_level("INFO", logger="qlora_kit"):
        assert table.waits(gpu.like)
    assert "could not be page-locked" in caplog.text
    gpu.error = None
    assert table.waits(gpu.like)
    assert table.weight is before
    assert not gpu.locked


def test_a_model_waits_where_its_table_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first parameter says where it runs."""
    gpu = Gpu(monkeypatch)
    model = build()
    keep_embeddings_on_host(model)
    assert lookup_waits(model)
    model.to("meta")
    assert not lookup_waits(model)
    assert len(gpu.locked) == 1
    gpu.locked.clear()
    gpu.error = RuntimeError("no")
    assert lookup_waits(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookups_do_not_wait(dtype: torch.dtype) -> None:
    """The bits of `nn.Embedding` on the GPU, from a table that was there or on the CPU."""
    weight = torch.randn(3000, 8192, dtype=dtype)
    ids = torch.randint(0, 3000, (3, 700), device="cuda")
    wanted = nn.functional.embedding(ids, weight.cuda())
    scale = torch.tensor(90.5)
    for source, factor in ((weight, None), (weight.cuda(), None), (weight, scale)):
        table = HostEmbedding(source, factor)
        assert table.weight.is_pinned() == source.is_cuda
        assert not table.waits(ids)
        assert table.weight.is_pinned()
        assert table.weight.device.type == "cpu"
        table(ids)  # compiled
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = table(ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = wanted if factor is None else wanted * factor.to(dtype).item()
        assert torch.equal(found, expected)
        assert torch.equal(table.weight, weight)
        assert torch.equal(table(ids[:, ::7].int()), expected[:, ::7])


@pytest.mark.gpu
def test_a_lookup_is_recorded_and_replayed() -> None:
    """As a CUDA graph, on other ids; locked by the lookup before."""
    table = HostEmbedding(torch.randn(500, 4096, dtype=torch.bfloat16))
    ids = torch.randint(0, 500, (2, 64), device="cuda")
    table(ids)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = table(ids)
    for _ in range(3):
        ids.random_(0, 500)
        graph.replay()
        assert torch.equal(found.cpu(), table.weight[ids.cpu()])


@pytest.mark.gpu
def test_a_copy_and_another_dtype_are_locked_anew() -> None:
    """Plain memory is never read by the kernel."""
    table = HostEmbedding(torch.randn(300, 64))
    ids = torch.randint(0, 300, (50,), device="cuda")
    table(ids)
    for other in (copy.deepcopy(table), table.to(torch.float16)):
        assert torch.equal(other(ids).cpu(), other.weight[ids.cpu()])
        assert other.weight.is_pinned()


@pytest.mark.gpu
def test_rows_of_odd_lengths_wait() -> None:
    """As before: looked up on the CPU."""
    table = HostEmbedding(torch.randn(300, 7, dtype=torch.bfloat16))
    ids = torch.randint(0, 300, (5, 9), device="cuda")
    assert table.waits(ids)
    assert torch.equal(table(ids).cpu(), table.weight[ids.cpu()])


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
