"""Updates on flat buffers inside the Trainer: the parent's optimizers, groups, norms, files."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.core import log
from qlora_kit.core.errors import AdapterError, ConfigError
from qlora_kit.optim.adamw import FlatAdamW
from qlora_kit.optim.bnb_adamw import FlatBnbAdamW
from qlora_kit.optim.create import flat_optimizer
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.train.helpers import adapted, arguments, make_trainer, rows, state

EPS = torch.finfo(torch.float32).eps


class PerTensor(Trainer):
    """As Transformers makes it."""

    def _may_be_flat(self) -> bool:
        return False


def trainer(kind: type[Trainer], folder: Path, **changes: Any) -> Trainer:
    model, adapter = adapted()
    return kind(
        model,
        adapter,
        arguments(folder, **changes),
        train_dataset=rows(20),
        data_collator=PadCollator(0),
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_torch", FlatAdamW),
        ("adamw_torch_fused", FlatAdamW),
        ("adamw_8bit", FlatBnbAdamW),
        ("adamw_bnb_8bit", FlatBnbAdamW),
        ("paged_adamw_8bit", FlatBnbAdamW),
        ("paged_adamw_32bit", FlatBnbAdamW),
        ("lion_8bit", None),
        ("adafactor", None),
        ("sgd", None),
    ],
)
def test_names_of_transformers(name: str, kind: type | None, tmp_path: Path) -> None:
    """AdamW in all variants is flat, with the options asked for; others are the parent's."""
    made = make_trainer(tmp_path, optim=name, adam_beta2=0.95, adam_epsilon=1e-6, max_steps=2)
    made.train()
    flat = flat_optimizer(made.optimizer)
    assert (flat is None) == (kind is None)
    if flat is not None:
        assert isinstance(flat, kind)
        assert flat.param_groups[0]["betas"] == (0.9, 0.95)
        assert flat.param_groups[0]["eps"] == 1e-6
        assert getattr(flat, "is_paged", False) == ("paged" in name)
        assert getattr(flat, "bits", 32) == (8 if "8bit" in name else 32)
    assert all("grad_norm" in r for r in made.state.log_history if "loss" in r)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit"])
def test_bits_are_those_of_the_parent(name: str, tmp_path: Path) -> None:
    """Six accumulated updates under a schedule with decay; without clipping, bit for bit."""
    settings: dict[str, Any] = {
        "optim": name,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }
    ours, theirs = (
        trainer(kind, tmp_path / kind.__name__, **settings) for kind in (Trainer, PerTensor)
    )
    ours.train()
    theirs.train()
    assert flat_optimizer(theirs.optimizer) is None
    found, wanted = state(ours), state(theirs)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    logs = [[r for r in t.state.log_history if "loss" in r] for t in (ours, theirs)]
    assert len(logs[0]) == 6
    for mine, other in zip(*logs, strict=True):
        assert (mine["loss"], mine["learning_rate"]) == (other["loss"], other["learning_rate"])
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_clipped_as_by_the_parent(tmp_path: Path) -> None:
    """The norms differ in their last bits, so the values do; without clipping they differ more."""
    ours, theirs, loose = (
        trainer(kind, tmp_path / str(i), max_grad_norm=norm, max_steps=1, save_steps=1)
        for i, (kind, norm) in enumerate([(Trainer, 0.01), (PerTensor, 0.01), (Trainer, 0.0)])
    )
    norms = []
    for made in (ours, theirs, loose):
        made.train()
        norms.append(made.state.log_history[0]["grad_norm"])
    n = ours.adapter.num_trainable
    assert norms[0] == pytest.approx(norms[1], rel=(n + 8) * EPS)
    assert norms[2] == pytest.approx(norms[1], rel=(n + 8) * EPS)
    assert norms[0] > 0.02  # it was clipped, and the norm reported is the one before

    def moments(made: Trainer) -> list[torch.Tensor]:
        saved = made.optimizer.state_dict()["state"]
        return [saved[number]["exp_avg"] for number in sorted(saved)]

    def distance(left: Trainer, right: Trainer) -> float:
        pairs = zip(moments(left), moments(right), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    largest = max(float(m.abs().max()) for m in moments(theirs))
    assert distance(ours, theirs) <= (n + 16) * EPS * largest
    assert distance(loose, theirs) > largest  # unclipped gradients are more than twice as large


def test_decay_groups_are_the_parents(tmp_path: Path) -> None:
    """Norms and biases do not decay, also in a head that is trained whole."""
    found = []
    for kind in (Trainer, PerTensor):
        model = tiny_models.build("llama")
        adapter = attach(model, adapted()[1].config, seed=3)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.requires_grad_(True)
        made = kind(model, adapter, arguments(tmp_path, weight_decay=0.1), train_dataset=rows(2))
        names = {id(p): n for n, p in model.named_parameters()}
        made.create_optimizer()
        found.append(
            [
                (group["weight_decay"], [names[id(p)] for p in group["params"]])
                for group in made.optimizer.param_groups
            ]
        )
    assert found[0] == found[1]
    assert [decay for decay, _ in found[0]] == [0.1, 0.0]
    assert any("norm" in name for name in found[0][1][1])


def test_parameters_that_cannot_be_flat_go_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied to a frozen tensor: the parent's optimizer, and one line that says why."""
    monkeypatch.setattr(log, "_said", set())
    made = make_trainer(tmp_path, max_steps=2)
    piece = made.adapter.pieces[0]
    made.model.register_buffer("mirror", piece.lora_B.detach()[:2])
    with caplog.at_level(logging.INFO, "qlora_kit"):
        made.train()
    assert flat_optimizer(made.optimizer) is None
    assert isinstance(made.optimizer.optimizer, torch.optim.AdamW)
    said = [r.message for r in caplog.records if "one tensor at a time" in r.message]
    assert len(said) == 1
    assert "shares its memory with another tensor of the model" in said[0]
    assert torch.equal(made.model.mirror, piece.lora_B[:2])


def test_checkpoints_of_the_parents_optimizer_resume(tmp_path: Path) -> None:
    """Written before buffers were flat, continued on flat ones: the same bits."""
    for name in ("adamw_torch", "adamw_8bit"):
        settings: dict[str, Any] = {"optim": name, "max_grad_norm": 0.0}
        whole = trainer(Trainer, tmp_path / name / "whole", **settings)
        whole.train()
        trainer(PerTensor, tmp_path / name / "old", **settings).train()
        (tmp_path / name / "old" / "checkpoint-6").rename(tmp_path / name / "done")
        resumed = trainer(Trainer, tmp_path / name / "old", **settings)
        resumed.train(resume_from_checkpoint=True)
        found, wanted = state(resumed), state(whole)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def lora_fa(folder: Path, corrected: bool, **changes: Any) -> Trainer:
    model = tiny_models.build("llama")
    adapter = attach(model, LoRAFA(rank=4, alpha=8, corrected_gradient=corrected), seed=3)
    return Trainer(
        model,
        adapter,
        arguments(folder, **changes),
        train_dataset=rows(20),
        data_collator=PadCollator(0),
    )


@pytest.mark.parametrize("name", ["sgd", "adamw_torch", "adamw_8bit"])
def test_corrected_gradient_before_clipping(name: str, tmp_path: Path) -> None:
    """Once per update, with every optimizer; the logged norm is that of corrected gradients."""
    seen: dict[bool, dict[str, torch.Tensor]] = {}
    norms = {}
    for corrected in (False, True):
        made = lora_fa(
            tmp_path / str(corrected), corrected, optim=name, max_steps=1, max_grad_norm=9
        )
        before = state(made)
        made.train()
        norms[corrected] = made.state.log_history[0]["grad_norm"]
        seen[corrected] = {k: v - before[k] for k, v in state(made).items()}
    assert norms[True] != pytest.approx(norms[False], rel=0.01)
    if name == "sgd":  # the step is the gradient: rate 1e-2
        clip = {c: min(1.0, 9 / (norms[c] + 1e-6)) * 1e-2 for c in norms}
        for piece in made.adapter.pieces:
            a = piece.lora_A.detach().double()
            key = f"{piece.place}.lora_B"
            plain, found = (seen[c][key].double() / -clip[c] for c in (False, True))
            wanted = plain @ torch.linalg.inv(a @ a.T) / piece.scale**2
            assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max(), key


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit"])
def test_corrected_runs_resume_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """The inverse is computed again from the restored A."""
    whole = lora_fa(tmp_path / "a", True, optim=name)
    whole.train()
    lora_fa(tmp_path / "b", True, optim=name).train()
    (tmp_path / "b" / "checkpoint-6").rename(tmp_path / "done")
    resumed = lora_fa(tmp_path / "b", True, optim=name)
    resumed.train(resume_from_checkpoint=True)
    found, wanted = state(resumed), state(whole)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_corrected_gradient_needs_a_frozen_a(tmp_path: Path) -> None:
    """Said when training starts, naming the module."""
    model = tiny_models.build("llama")
    adapter = attach(model, LoRAFA(rank=4, corrected_gradient=True))
    adapter.pieces[1].lora_A.requires_grad_(True)
    made = Trainer(model, adapter, arguments(tmp_path), train_dataset=rows(2))
    with pytest.raises(AdapterError, match="trains its A"):
        made.train()


@pytest.mark.parametrize("divider", ["DeepSpeed", "FSDP"])
def test_whole_gradients_are_needed(
    divider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gradients are divided, methods that change them are refused, and no others."""
    parents = transformers.Trainer.create_accelerator_and_postprocess

    def enabled(self: transformers.Trainer) -> None:
        parents(self)
        setattr(self, f"is_{divider.lower()}_enabled", True)

    def make(config: LoRA) -> Trainer:
        model = tiny_models.build("llama")
        return Trainer(model, attach(model, config), arguments(tmp_path), train_dataset=rows(4))

    corrected = LoRAFA(rank=4, corrected_gradient=True)
    make(AdaLoRA(rank=4)), make(corrected)
    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", enabled)
    with pytest.raises(ConfigError, match=f"adalora .* {divider} divides them"):
        make(AdaLoRA(rank=4))
    with pytest.raises(ConfigError, match=f"corrected_gradient .* {divider} divides them"):
        make(corrected)
    assert make(LoRAFA(rank=4)).ranks is None


def test_training_twice_continues_on_the_same_buffers(tmp_path: Path) -> None:
    """A second call of `train` keeps the optimizer; a second Trainer takes the model over."""
    made = make_trainer(tmp_path / "a", max_steps=2)
    made.train()
    first = flat_optimizer(made.optimizer)
    made.args.max_steps = 4
    made.train()
    assert flat_optimizer(made.optimizer) is first
    other = Trainer(
        made.model,
        made.adapter,
        arguments(tmp_path / "b", max_steps=2),
        train_dataset=rows(20),
        data_collator=PadCollator(0),
    )
    before = state(other)
    other.train()
    assert any(not torch.equal(before[key], value) for key, value in state(other).items())
    assert all(isinstance(p, nn.Parameter) for p in made.adapter.parameters())
