"""Variants of LoRA in whole trainings: they learn, resume to the same bits, checkpoint, merge."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.lora.dora import DoRALinear
from qlora_kit.block.compiled import compile_layers
from qlora_kit.export.originals import original_weights
from qlora_kit.load.model import load
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.attention.transformers_door import unpadded_inputs
from qlora_kit.quant.config import QuantConfig
from qlora_kit.step.prepare import prepare_model
from qlora_kit.train.config import ExportConfig
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.run import run_training
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.train.helpers import arguments, rows
from tests.train.test_run import base, make_config

__all__ = ["base"]

CASES: dict[str, tuple[str, LoRA]] = {
    "dora": ("llama", DoRA(rank=4, alpha=8)),
    "dora-gpt2": ("gpt2", DoRA(rank=4, alpha=8, dropout=0.1)),
    "pissa": ("llama", LoRA(rank=4, alpha=8, init="pissa", lr_ratio_b=4)),
    "loftq": ("qwen3", LoRA(rank=4, alpha=8, init="loftq")),
    "slices": ("phi3", LoRA(rank=4, alpha=8, slices={"qkv_proj": ("q", "v")})),
    "slices-gpt2": ("gpt2", LoRA(rank=4, alpha=8, slices={"c_attn": ("q", "v")})),
    "embedding": ("llama", LoRA(rank=4, alpha=8, targets=("all-linear", "embed_tokens"))),
    "layers": ("llama", LoRA(rank=4, alpha=8, layers_to_transform=(1,))),
}


def adapted(case: str) -> AttachedAdapter:
    family, config = CASES[case]
    folder = tiny_models.saved(family)
    model, _ = load(folder, quant=QuantConfig(), dtype="float32", device="cpu")
    originals = original_weights(folder) if config.init == "loftq" else None
    return attach(model, config, seed=3, originals=originals)


def trainer(case: str, folder: Path, **changes: Any) -> Trainer:
    adapter = adapted(case)
    return Trainer(
        adapter.model,
        adapter,
        arguments(folder, **changes),
        train_dataset=rows(20),
        data_collator=PadCollator(0),
    )


@pytest.mark.parametrize("case", CASES)
def test_it_learns_and_resumes_to_the_same_bits(case: str, tmp_path: Path) -> None:
    whole = trainer(case, tmp_path)
    start = {n: t.clone() for n, t in whole.adapter.state_dict().items()}
    frozen = {n: p.clone() for n, p in whole.model.named_parameters() if not p.requires_grad}
    whole.train()
    losses = [r["loss"] for r in whole.state.log_history if "loss" in r]
    assert all(loss > 0 for loss in losses)
    state = whole.adapter.state_dict()
    trained = {n for n, _ in whole.adapter.named_parameters()}
    assert {n for n in state if not torch.equal(state[n], start[n])} == trained
    assert all(torch.equal(p, frozen[n]) for n, p in whole.model.named_parameters() if n in frozen)
    again = trainer(case, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(t, state[n]) for n, t in again.adapter.state_dict().items())


@pytest.mark.parametrize("case", ["dora", "pissa", "slices", "embedding"])
def test_checkpointing_gives_the_same_gradients(case: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        adapter = adapted(case)
        model = adapter.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        ids = tiny_models.tokens()
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in adapter.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name]), name


def test_autocast_computes_in_its_dtype() -> None:
    adapter = adapted("dora")
    layer = next(p for p in adapter.pieces if isinstance(p, DoRALinear))
    assert isinstance(layer.base, NF4Linear)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["embedding", "layers", "loftq", "dora", "pissa", "slices"])
def test_fused_layers_give_the_same_gradients(case: str, tmp_path: Path) -> None:
    gradients = []
    for step in ("eager", "fused"):
        adapter = adapted(case)
        model = adapter.model.train()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        prepare_model(model, arguments(tmp_path), step, "auto")
        ids = tiny_models.tokens()
        inputs = unpadded_inputs() if step == "fused" else {}
        model(ids, labels=ids, **inputs).loss.backward()
        gradients.append({n: p.grad for n, p in adapter.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        other = gradients[1][name]
        assert other is not None
        assert (gradient - other).norm() < 1e-4 * gradient.norm(), name
        assert (gradient - 1.01 * other).norm() > 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("case", ["dora", "pissa", "slices"])
def test_compiled_layers_give_the_same_gradients(case: str) -> None:
    """One graph for both layers, nothing in it that breaks it."""
    gradients = []
    for compiled in (False, True):
        adapter = adapted(case)
        model = adapter.model.train()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        if compiled:
            compile_layers(model, "save", backend="aot_eager")
        ids = tiny_models.tokens()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in adapter.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        other = gradients[1][name]
        assert other is not None
        assert (gradient - other).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_a_whole_run_with_a_start_from_the_weight(base: Path, tmp_path: Path, init: str) -> None:
    config = make_config(
        base,
        tmp_path,
        adapter=LoRA(rank=4, alpha=8, init=init),
        export=ExportConfig(merge=True, dtype="float32"),
    )
    result = run_training(config)
    assert result.record["merge"]["deviation"]["kl"] < 1e-6
    assert result.after[0].loss < result.before[0].loss
