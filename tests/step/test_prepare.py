"""Fused layers under the Trainer: the same losses as the model's own code, on every collator."""

import os
from dataclasses import dataclass

import pytest
import torch

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.block.compiled import why_not_compiled
from qlora_kit.block.install import FusedBlocks, FusedLayer
from qlora_kit.core.errors import ConfigError
from qlora_kit.nn.host_embedding import HostEmbedding, keep_embeddings_on_host
from qlora_kit.step.prepare import FusedCollator, fused_inputs, prepare_model
from qlora_kit.train.data.collate import PackedCollator, PadCollator
from qlora_kit.train.repeatable import CUBLAS, WORKSPACE
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.adapters.bases import quantize
from tests.train.helpers import arguments


def rows(packed, count=12, seed=3):
    """Rows of different lengths; packed ones hold two documents."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 90, (), generator=generator))
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        row = {"input_ids": ids, "labels": list(ids)}
        if packed:
            cut = length // 2
            row["position_ids"] = [*range(cut), *range(length - cut)]
            row["labels"][cut] = -100
        made.append(row)
    return made


@dataclass
class Trained:
    """What a short training left."""

    losses: list[float]
    eval_loss: float
    adapter: list[torch.Tensor]


def train(
    folder,
    family,
    step,
    *,
    packed=False,
    steps=4,
    policy="recompute_elementwise",
    tile=None,
    on_host=False,
):
    torch.manual_seed(0)
    model = tiny_models.build(family, **({"tie_word_embeddings": False} if on_host else {}))
    adapter = attach(model, LoRA(rank=4, alpha=6), seed=1)
    if on_host:
        keep_embeddings_on_host(model)
    trainer = Trainer(
        model,
        adapter,
        arguments(folder, max_steps=steps, logging_steps=1, learning_rate=1e-2),
        train_dataset=rows(packed),
        eval_dataset=rows(packed, count=4, seed=9),
        data_collator=(PackedCollator if packed else PadCollator)(0),
        step=step,
        activations=policy,
        tile=tile,
    )
    if on_host:
        assert trainer.graphs is None
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()["eval_loss"]
    if trainer.fused is not None:
        trainer.fused.remove()
    assert not any(isinstance(module, FusedLayer) for module in model.modules())
    return Trained(losses, evaluated, [p.detach() for _, p in adapter.named_parameters()])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.transformers_compat
def test_losses_are_those_of_the_models_own_code(tmp_path, family, packed, monkeypatch):
    """Sliding windows of 64 tokens, padding and documents included; every layer ran fused."""
    ran = []
    run = FusedBlocks.run

    def counted(self, runner, *rest):
        ran.append(runner.index)
        return run(self, runner, *rest)

    monkeypatch.setattr(FusedBlocks, "run", counted)
    fused = train(tmp_path / "fused", family, "fused", packed=packed)
    assert len(ran) == 2 * (4 + 1)  # layers, by steps and one batch of evaluation
    own = train(tmp_path / "own", family, "eager", packed=packed)
    assert fused.losses == pytest.approx(own.losses, rel=1e-5)
    assert fused.eval_loss == pytest.approx(own.eval_loss, rel=1e-5)
    moved = sum((a - b).norm() for a, b in zip(fused.adapter, own.adapter, strict=True))
    assert moved < 1e-3 * sum(a.norm() for a in own.adapter)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiled_layers_train_alike(tmp_path, packed):
    """torch.compile runs the layers of a family that cannot be fused."""
    reason = why_not_compiled(tiny_models.build("gpt2"))
    if reason is not None:
        pytest.skip(reason)
    compiled = train(tmp_path / "compiled", "gpt2", "compiled", packed=packed, steps=2)
    own = train(tmp_path / "own", "gpt2", "eager", packed=packed, steps=2)
    assert compiled.losses == pytest.approx(own.losses, rel=1e-5)


def test_documents_matter(tmp_path):
    """Without the documents' starts the losses of packed rows are others."""
    packed = train(tmp_path / "a", "llama", "fused", packed=True, steps=1)
    mixed = [{k: v for k, v in row.items() if k != "position_ids"} for row in rows(True)]
    batch = PadCollator(0)(mixed)
    assert "position_ids" not in batch
    model = tiny_models.build("llama")
    attach(model, LoRA(rank=4, alpha=6), seed=1)
    loss = model(**batch, use_cache=False).loss.item()
    assert abs(loss - packed.losses[0]) > 1e-3


def test_masks_are_dropped_only_where_padding_is_on_the_right():
    def collate(mask):
        return FusedCollator(lambda _: {"input_ids": mask, "attention_mask": mask})([])

    right, left = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert fused_inputs(collate(right))["attention_mask"].shape == (1, 1, 1, 1)
    assert fused_inputs(collate(left))["attention_mask"] is left
    assert fused_inputs(collate(right))["use_cache"] is False


def test_what_cannot_be_fused_says_why(tmp_path):
    model = tiny_models.build("gpt2")
    attach(model, LoRA(rank=2))
    args = arguments(tmp_path)
    with pytest.raises(ConfigError, match="Llama-like"):
        prepare_model(model, args, "fused", "auto")
    with pytest.raises(ConfigError, match="unknown step 'fast'"):
        prepare_model(model, args, "fast", "auto")
    assert prepare_model(model, args, "auto", "auto") is None


@pytest.mark.parametrize("packed", [False, True])
def test_training_on_long_rows_gives_the_same_adapter(tmp_path, packed):
    """In tiles, inputs offloaded, embeddings on the host; bounds as above."""
    usual = train(tmp_path / "a", "llama", "fused", packed=packed, on_host=True)
    options = {"packed": packed, "policy": "offload", "tile": 32, "on_host": True}
    long = train(tmp_path / "b", "llama", "fused", **options)
    assert long.losses == pytest.approx(usual.losses, rel=1e-5)
    assert long.eval_loss == pytest.approx(usual.eval_loss, rel=1e-5)
    moved = sum((a - b).norm() for a, b in zip(long.adapter, usual.adapter, strict=True))
    assert moved < 1e-3 * sum(a.norm() for a in usual.adapter)


def test_the_tile_reaches_the_layers(tmp_path, monkeypatch):
    """As the configuration says it; lookups that wait keep steps off CUDA graphs."""
    model = tiny_models.build("llama", tie_word_embeddings=False)
    attach(model, LoRA(rank=2))
    for tile, wanted in (("auto", 0), (None, None), (4096, 4096)):
        fused = prepare_model(model, arguments(tmp_path), "fused", "auto", tile)
        assert fused.blocks.tile == wanted
        assert fused.never_waits
        fused.remove()
    keep_embeddings_on_host(model)
    fused = prepare_model(model, arguments(tmp_path), "fused", "auto")
    for waits in (True, False):
        monkeypatch.setattr(HostEmbedding, "waits", lambda self, like, waits=waits: waits)
        assert fused.never_waits == (not waits)
    monkeypatch.undo()
    assert not fused.never_waits  # on a CPU


def test_checkpointing_becomes_a_policy(tmp_path):
    """transformers' own recomputation is off where layers are fused, and theirs is on."""
    model = tiny_models.build("llama")
    attach(model, LoRA(rank=2))
    args = arguments(tmp_path, gradient_checkpointing=True)
    fused = prepare_model(model, args, "fused", "auto")
    assert fused.blocks.policies == ("recompute_all", "recompute_all")
    assert not args.gradient_checkpointing
    fused.remove()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_bits_are_asked_of_the_layers(tmp_path, monkeypatch, deterministic):
    """`train.deterministic` reaches attention, and costs no more than its bits need."""
    for name in ("CUDA_LAUNCH_BLOCKING", CUBLAS):
        monkeypatch.setenv(name, "")
    model = tiny_models.build("llama")
    adapter = attach(model, LoRA(rank=2))
    args = arguments(tmp_path, full_determinism=deterministic)
    try:
        trainer = Trainer(model, adapter, args, train_dataset=rows(False), step="fused")
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.utils.deterministic.fill_uninitialized_memory != deterministic
        assert os.environ[CUBLAS] == (WORKSPACE if deterministic else "")
        rules = [layer._runner.description.rule for layer in model.model.layers]
        assert [rule.deterministic for rule in rules] == [deterministic] * len(rules)
        trainer.fused.remove()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_decoded_layers_reach_the_fused_ones(tmp_path):
    """`train.keep_decoded`: the first layers' weights are there before the first step."""
    found = []
    for kept in (0, 1):
        model = tiny_models.build("llama")
        quantize(model)
        adapter = attach(model, LoRA(rank=2))
        options = {"train_dataset": rows(False), "step": "fused", "keep_decoded": kept}
        trainer = Trainer(model, adapter, arguments(tmp_path), **options)
        found.append(len(trainer.fused.blocks.kept_decoded()))
        trainer.fused.remove()
    assert found == [0, 4]  # qkv, o, gate and up, down of the first layer
