"""A run's settings become Transformers' arguments; what cannot work is refused by name."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from qlora_kit.core.errors import ConfigError
from qlora_kit.train import arguments as module
from qlora_kit.train.arguments import check_training, training_arguments, update_count
from qlora_kit.train.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig


def run(device: str = "cpu", **train: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="m", device=device),
        data=DataConfig(train="t.jsonl"),
        train=TrainConfig(**train),
    )


def make(folder: Path, metric: str | None = "eval_loss", **train: Any) -> Any:
    return training_arguments(run(**train), folder=folder, rows=64, device="cpu", metric=metric)


def test_fields_arrive(tmp_path: Path) -> None:
    """Every field of the optimization reaches the Trainer."""
    made = make(
        tmp_path,
        epochs=2.5,
        batch_size=4,
        gradient_accumulation=3,
        learning_rate=1e-3,
        schedule="cosine",
        warmup_ratio=0.1,
        weight_decay=0.2,
        max_grad_norm=0.7,
        gradient_checkpointing=True,
        seed=11,
        log_every=7,
        keep_checkpoints=4,
    )
    assert (made.num_train_epochs, made.per_device_train_batch_size) == (2.5, 4)
    assert made.gradient_accumulation_steps == 3
    assert (made.learning_rate, made.weight_decay, made.max_grad_norm) == (1e-3, 0.2, 0.7)
    assert made.get_warmup_steps(100) == 10
    assert made.gradient_checkpointing
    assert made.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert (made.seed, made.logging_steps, made.save_total_limit) == (11, 7, 4)
    assert made.save_strategy == "epoch"
    assert made.eval_strategy == "no"
    assert made.prediction_loss_only
    assert not made.load_best_model_at_end
    assert not made.bf16  # the model computes in its own dtype, without autocast
    assert not made.fp16


def test_best_checkpoint_follows_evaluation(tmp_path: Path) -> None:
    """Evaluating while training means saving at the same updates and keeping the best."""
    made = make(tmp_path, eval_every=5)
    assert (made.eval_strategy, made.eval_steps) == ("steps", 5)
    assert (made.save_strategy, made.save_steps) == ("steps", 5)
    assert made.load_best_model_at_end
    assert (made.metric_for_best_model, made.greater_is_better) == ("eval_loss", False)
    assert make(tmp_path, eval_every=5, save_every=10).save_steps == 10


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
def test_every_schedule_can_be_made(tmp_path: Path, schedule: str) -> None:
    """Schedules that need more than a name get it."""
    made = make(tmp_path, schedule=schedule, eval_every=2)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    get_scheduler(
        made.lr_scheduler_type, optimizer, 2, 20, scheduler_specific_kwargs=made.lr_scheduler_kwargs
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adamw_torhc"}, "adamw_torch"),
        ({"optimizer": "paged_adamw_8bit"}, "no GPU"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"loggers": ("wand",)}, "Did you mean 'wandb'"),
        ({"batch_size": 0}, "at least 1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"epochs": 0}, "nothing to train"),
        ({"eval_every": 5}, "held-out rows"),
        ({"early_stopping": 2}, "eval_every"),
        ({"schedule": "reduce_lr_on_plateau"}, "eval_every"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_refusals(settings: dict[str, Any], words: str) -> None:
    """Each names the field and what to do."""
    with pytest.raises(ConfigError, match=words):
        check_training(run(**settings), on_gpu=False, has_eval=False)


def test_save_and_eval_have_to_meet() -> None:
    """A best checkpoint has to exist when it is the best."""
    with pytest.raises(ConfigError, match="multiple"):
        check_training(run(eval_every=4, save_every=6), on_gpu=False, has_eval=True)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that installs what is missing."""

    def hide(name: str) -> Any:
        return None if name in ("bitsandbytes", "wandb") else find_spec(name)

    monkeypatch.setattr(module, "find_spec", hide)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        check_training(run(optimizer="adamw_8bit"), on_gpu=True, has_eval=False)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_training(run(loggers=("tensorboard", "wandb")), on_gpu=True, has_eval=False)


def test_update_count_equals_the_trainers(tmp_path: Path) -> None:
    """What is announced is what is done: short last batches and part epochs included."""
    from tests.train.helpers import make_trainer

    for count, batch, accumulation, epochs in ((10, 4, 1, 1.0), (10, 3, 2, 1.5), (7, 2, 3, 2.0)):
        trainer = make_trainer(
            tmp_path,
            count=count,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            max_steps=-1,
            save_strategy="no",
        )
        config = TrainConfig(batch_size=batch, gradient_accumulation=accumulation, epochs=epochs)
        assert trainer.train().global_step == update_count(config, count)


def test_eval_batch_size(tmp_path: Path) -> None:
    """Held-out rows have a batch size of their own."""
    config = RunConfig(
        model=ModelConfig(path="m"),
        data=DataConfig(train="t.jsonl"),
        eval=EvalConfig(batch_size=5),
    )
    made = training_arguments(config, folder=tmp_path, rows=8, device="cpu")
    assert made.per_device_eval_batch_size == 5
