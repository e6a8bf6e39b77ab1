"""LoRA+: B learns at its own rate, flat or not, under schedules and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.registry import make_adapter_config
from qlora_kit.core.errors import ConfigError
from qlora_kit.optim.create import flat_optimizer
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.trainer import Trainer
from tests.train.helpers import adapted, arguments, rows

RATIO = 16.0


def trainer(folder: Path, ratio: float = RATIO, **changes: Any) -> Trainer:
    model, adapter = adapted(lr_ratio_b=ratio)
    settings = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 2}
    return Trainer(
        model,
        adapter,
        arguments(folder, **settings | changes),
        train_dataset=rows(20),
        data_collator=PadCollator(0),
    )


def values(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.adapter.named_parameters()}


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "sgd", "lion_8bit"]
)
def test_groups_and_rates(name: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, optim=name, weight_decay=0.1)
    made.train()
    optimizer = made.optimizer
    assert optimizer is not None
    assert (flat_optimizer(optimizer) is None) == (name in ("sgd", "lion_8bit"))
    b = {id(p) for n, p in made.adapter.named_parameters() if n.endswith("lora_B")}
    for group in optimizer.param_groups:
        wanted = 1e-3 * (RATIO if group["params"] and id(group["params"][0]) in b else 1.0)
        if group["params"]:
            assert group["initial_lr"] == pytest.approx(wanted)
        assert len({id(p) in b for p in group["params"]}) <= 1
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in made.adapter.parameters())
    logged = [r["learning_rate"] for r in made.state.log_history if "learning_rate" in r]
    assert max(logged) <= 1e-3  # A's


def by_hand(made: Trainer, ratio: float) -> dict[str, torch.Tensor]:
    """The same updates by torch's AdamW, from the recorded gradients."""
    named = dict(made.adapter.named_parameters())
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    groups = [
        {"params": [p for n, p in copies.items() if n.endswith(end)], "lr": rate}
        for end, rate in (("lora_A", 1e-3), ("lora_B", 1e-3 * ratio))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    finish = made._finish_gradients

    def recorded(*arguments: Any) -> Any:
        norm = finish(*arguments)
        for name, p in named.items():
            copies[name].grad = p.grad.detach().clone()
        optimizer.step()
        return norm

    made._finish_gradients = recorded  # type: ignore[method-assign]
    return copies


@pytest.mark.parametrize("step_by_step", [False, True])
def test_updates_are_those_of_torch_with_two_rates(step_by_step: bool, tmp_path: Path) -> None:
    made = trainer(tmp_path, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.3)
    if step_by_step:
        made._may_be_flat = lambda: False  # type: ignore[method-assign]
    copies = by_hand(made, RATIO)
    made.train()
    eps = torch.finfo(torch.float32).eps
    for name, value in values(made).items():
        assert (value - copies[name]).abs().max() <= 64 * eps * value.abs().max()
    # the bound bites: at one rate for both, B ends elsewhere
    other = trainer(tmp_path / "o", 1.0, lr_scheduler_type="constant", warmup_steps=0)
    other.train()
    wrong = values(other)
    assert all(
        (value - wrong[name]).abs().max() > 0.5 * value.abs().max()
        for name, value in values(made).items()
        if name.endswith("lora_B")
    )


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    wanted = values(whole)
    assert all(torch.equal(value, wanted[name]) for name, value in values(again).items())


def test_a_ratio_of_one_makes_the_usual_groups(tmp_path: Path) -> None:
    assert len(trainer(tmp_path, 1.0).create_optimizer().param_groups) == 2
    assert len(trainer(tmp_path).create_optimizer().param_groups) == 4


def test_what_cannot_be(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(ConfigError, match="lr_ratio_b needs an optimizer that takes"):
        made.create_optimizer()
    with pytest.raises(ConfigError, match="1 where A is frozen"):
        make_adapter_config("lora_fa", LoRA(lr_ratio_b=2))
    with pytest.raises(ConfigError, match="must be positive"):
        LoRA(lr_ratio_b=0)
