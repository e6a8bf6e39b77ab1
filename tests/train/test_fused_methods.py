"""Every method: whether its layers run as one step and are recorded, or the reason why not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.registry import METHODS, OTHERS, method_name
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.core.errors import ConfigError
from qlora_kit.step.prepare import marked
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.adapters.bases import quantize
from tests.block.helpers import counted
from tests.train.helpers import arguments, rows

_BUDGET = RankBudget(target_rank=2, start_updates=0, final_updates=1, every=1)


def _lora(**fields: Any) -> LoRA:
    return LoRA(rank=4, alpha=5.0, **fields)


FUSED: dict[str, tuple[str, LoRA]] = {
    **{name: ("llama", METHODS[name](rank=4)) for name in ("lora", "lora_fa", "dora")},
    "rslora": ("llama", _lora(rslora=True)),
    "adalora": ("llama", AdaLoRA(rank=4, budget=_BUDGET)),
    "adalora, paper's term": (
        "llama",
        AdaLoRA(rank=4, budget=replace(_BUDGET, orthogonality_form="paper")),
    ),
    "pissa": ("llama", _lora(init="pissa")),
    "loftq": ("llama", _lora(init="loftq")),
    "lora+": ("llama", _lora(lr_ratio_b=16.0)),
    "lora_fa, corrected": ("llama", METHODS["lora_fa"](rank=4, corrected_gradient=True)),
    "embeddings": ("llama", _lora(targets=("embed_tokens", "q_proj"))),
    "some linears": ("llama", _lora(targets=("q_proj", "down_proj"))),
    "patterns": ("llama", _lora(rank_pattern={"v_proj": 12}, alpha_pattern={"up_proj": 3.0})),
    "some layers": ("llama", _lora(layers_to_transform=(1,))),
    "slices": ("phi3", _lora(slices={"qkv_proj": ("q", "v"), "gate_up_proj": ("up",)})),
    "16-bit masters": ("llama", _lora(dtype="bfloat16")),
    "head": ("llama", _lora(train_modules=("lm_head",))),
}
"""Name to family and configuration."""

REASONS: dict[str, tuple[Any, str]] = {
    "dropout": (_lora(dropout=0.1), "has dropout"),
    "pissa, dropout": (_lora(init="pissa", dropout=0.1), "has dropout"),
    "glora": (GLoRA(), r"no linear \(GLoRALinear\)"),
    "bottleneck": (Bottleneck(width=4), r"no linear \(Bottleneck"),
    "bottleneck, lin": (Bottleneck(width=4, kind="lin"), r"no linear \(Bottleneck"),
    "bitfit": (BitFit(), "a projection is trained"),
    "top_k": (TopK(blocks=1), r"no linear \(TrainedLinear\)"),
    "full": (Full(), "a projection is trained"),
    "prefix_tuning": (PrefixTuning(length=2), "a prefix or a prompt"),
    "prompt_tuning": (PromptTuning(length=2), "a prefix or a prompt"),
    "prompt_tuning, all layers": (PromptTuning(length=2, layers="all"), "a prefix or a prompt"),
}
"""Name to configuration and what `step: fused` says."""


def make(
    folder: Path, family: str, config: Any, *, nf4: bool = True, gpu: bool = False, **changes: Any
) -> Trainer:
    """A Trainer of fused layers, on a tiny NF4 model; on a GPU in bfloat16, rows of one width."""
    model = tiny_models.build(family, dtype=torch.bfloat16 if gpu else torch.float32)
    weights = {
        n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "weight")
    }
    if nf4:
        quantize(model)
    if gpu:
        model.to("cuda")
    row = [*range(3, 27)]
    adapter = attach(model, config, seed=3, originals=weights.__getitem__)
    return Trainer(
        model,
        adapter,
        arguments(folder, save_strategy="no", use_cpu=not gpu, **{"max_steps": 3} | changes),
        train_dataset=[{"input_ids": row, "labels": row}] * 12 if gpu else rows(12),
        data_collator=PadCollator(0),
        step="fused",
    )


def test_no_method_is_forgotten() -> None:
    """Every name of a run's `method:` is in one of the lists."""
    named = {*FUSED, *REASONS}
    assert {*METHODS, *OTHERS} <= named
    for name, (_, config) in FUSED.items():
        assert name not in METHODS or method_name(config) == name


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_recorded(name: str, tmp_path: Path) -> None:
    """Every layer as one step, forward and backward of a batch left to `StepGraphs`."""
    trainer = make(tmp_path, *FUSED[name])
    assert trainer.graphs is not None
    asked = []
    trainer.graphs.run = lambda *batch: asked.append(batch)  # type: ignore[method-assign]
    with counted(trainer.fused.blocks) as ran:
        trainer.train()
    assert ran == [0, 1] * 3
    assert len(asked) == 3


@pytest.mark.parametrize("name", FUSED)
def test_a_recorded_step_reads_the_masters(name: str, tmp_path: Path) -> None:
    """What would be recorded depends on no value of Python's that training changes: after writes
    that move no version counter it gives what the model's own code gives."""
    trainer = make(tmp_path, *FUSED[name])
    plain = PadCollator(0)(rows(2))
    batch = marked(plain)
    items = torch.tensor(5)
    named = dict(trainer.adapter.named_parameters())
    losses = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in named.values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data.add_(noise, alpha=0.2)
        trainer.model.zero_grad()
        loss = trainer._graph_loss(dict(batch), items)
        loss.backward()
        losses.append((loss.item(), [p.grad.clone() for p in named.values()]))
    trainer.fused.remove()
    trainer.model.zero_grad()
    loss = trainer._graph_loss(dict(plain), items)
    loss.backward()
    most = 1e-5 if "16" not in name else 2e-3
    assert losses[1][0] == pytest.approx(loss.item(), rel=most)
    assert losses[0][0] != pytest.approx(loss.item(), rel=most)
    for parameter, found in zip(named.values(), losses[1][1], strict=True):
        wanted = parameter.grad
        assert (found - wanted).norm() <= 100 * most * wanted.norm()


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_fused_says_why(name: str, tmp_path: Path) -> None:
    config, reason = REASONS[name]
    with pytest.raises(ConfigError, match=reason):
        make(tmp_path, "llama", config, nf4=not isinstance(config, Full))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
def test_replays_give_what_steps_give(name: str, tmp_path: Path) -> None:
    """Loss and gradients after some updates, from the recording and without it."""
    trainer = make(tmp_path, *FUSED[name], gpu=True, max_steps=6)
    trainer.train()
    assert trainer.graphs is not None
    assert trainer.graphs._recorded
    batch = marked(PadCollator(0)([trainer.train_dataset[0], trainer.train_dataset[1]]))
    items = torch.tensor(46, device="cuda")
    named = dict(trainer.adapter.named_parameters())

    def step() -> tuple[float, list[torch.Tensor]]:
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, dict(batch), items).item()
        return loss, [p.grad.clone() for p in named.values() if p.grad is not None]

    before = step()
    for parameter in named.values():
        parameter.data.mul_(1.2)
    replayed = step()
    assert len(trainer.graphs._recorded) == 1
    trainer.graphs = None
    loss, wanted = step()
    assert replayed[0] == pytest.approx(loss, rel=1e-3)
    assert before[0] != pytest.approx(loss, rel=1e-3)
    for found, right in zip(replayed[1], wanted, strict=True):
        assert (found - right).norm() <= 0.02 * right.norm()
