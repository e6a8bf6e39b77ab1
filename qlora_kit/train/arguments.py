"""From a `RunConfig` to `transformers.TrainingArguments`, with every refusal said early.

Names of optimizers, schedules and loggers are Transformers' own. What would fail
minutes later (a logger that is not installed, a paged optimizer without a GPU,
early stopping without evaluations) fails here, before a model is loaded.
"""

import dataclasses
import math
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from qlora_kit.adapters.mergeable import sees_packed_rows, why_not_merged
from qlora_kit.adapters.registry import make_adapter_config
from qlora_kit.core.errors import ConfigError
from qlora_kit.train.config import RunConfig, TrainConfig

LOGGERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet-ml",
    "swanlab": "swanlab",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "codecarbon": "codecarbon",
}
"""Logger name, as Transformers knows it, to the package that provides it."""

DECAY_SHARE = 0.2
"""Share of the updates in which `warmup_stable_decay` decays."""
MIN_LR_RATE = 0.1
"""Final learning rate of the schedules `..._with_min_lr`, relative to the peak."""


def _unknown(kind: str, name: str, known: list[str]) -> ConfigError:
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}.{hint}")


def is_on_gpu(device: str) -> bool:
    """Whether a run trains on a GPU.

    Args:
        device: as a run names it.

    Returns:
        For `auto`, whether there is one.

    Example:
        >>> is_on_gpu("cpu"), is_on_gpu("cuda:0")
        (False, True)
    """
    return torch.cuda.is_available() if device == "auto" else device.startswith("cuda")


def check_optimizer(name: str, *, on_gpu: bool) -> None:
    """Refuse an optimizer that is unknown, not installed, or needs a GPU.

    Args:
        name: a Transformers optimizer name.
        on_gpu: whether the model trains on a GPU.

    Raises:
        ConfigError: with what to use or install instead.

    Example:
        >>> check_optimizer("adamw_torch", on_gpu=False)
        >>> check_optimizer("adam_torch", on_gpu=False)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        qlora_kit.core.errors.ConfigError: unknown optimizer 'adam_torch'; known: ...
    """
    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        raise _unknown("optimizer", name, known)
    if ("8bit" in name or "paged" in name or "bnb" in name) and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer {name!r} comes from bitsandbytes, which is not installed. "
            "Run `pip install bitsandbytes`, or use optimizer=adamw_torch."
        )
    if "paged" in name and not on_gpu:
        raise ConfigError(
            f"optimizer {name!r} pages its state between GPU and host memory and there is no GPU "
            "here. Use adamw_torch, or adamw_8bit."
        )


def check_loggers(names: tuple[str, ...]) -> None:
    """Refuse a logger that is unknown or whose package is missing.

    Args:
        names: Transformers' integration names.

    Raises:
        ConfigError: with the line that installs what is missing.

    Example:
        >>> check_loggers(())
    """
    for name in names:
        if name not in LOGGERS:
            raise _unknown("logger", name, list(LOGGERS))
        if find_spec(LOGGERS[name].replace("-", "_")) is None:
            raise ConfigError(
                f"logger {name!r} needs a package that is not installed. Run "
                f"`pip install {LOGGERS[name]}`, or remove it from train.loggers."
            )


def check_method(config: RunConfig) -> None:
    """Refuse a method on a base that it cannot train, and a merge that it does not allow.

    Args:
        config: the run.

    Raises:
        ConfigError: naming the fields and what to change.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t"), method="full")
        >>> check_method(run)
        Traceback (most recent call last):
        qlora_kit.core.errors.ConfigError: method full changes every weight, ...
    """
    if config.method == "full" and config.model.bits == 4:
        raise ConfigError(
            "method full changes every weight, and a 4-bit weight has no gradient. Set "
            "model.bits=16, or train part of the model: top_k decodes the blocks it trains."
        )
    if config.method == "full" and config.model.embeddings_on_host:
        raise ConfigError(
            "method full trains the embeddings, which cannot stay in host memory then. Set "
            "model.embeddings_on_host=false."
        )
    method = make_adapter_config(config.method, *config.settings)
    if config.data.packing and not sees_packed_rows(method):
        raise ConfigError(
            f"method {config.method} puts positions at one place of a row, where only one of the "
            "documents packed in it would see them. Set data.packing=false."
        )
    reason = why_not_merged(method)
    if config.export.merge and reason is not None:
        raise ConfigError(f"export.merge is not for method {config.method}. {reason}")


def update_count(config: TrainConfig, rows: int) -> int:
    """Number of optimizer updates of a run on one device.

    Args:
        config: the optimization.
        rows: training rows, after packing.

    Returns:
        Updates, at least one.

    Example:
        >>> update_count(TrainConfig(epochs=2, batch_size=8, gradient_accumulation=2), 100)
        14
    """
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(rows / config.batch_size)
    per_epoch = math.ceil(batches / config.gradient_accumulation)
    return max(1, math.ceil(per_epoch * config.epochs))


def check_training(config: RunConfig, *, on_gpu: bool, has_eval: bool) -> None:
    """Refuse settings that cannot work together.

    Args:
        config: the run.
        on_gpu: whether the model trains on a GPU.
        has_eval: whether there are held-out rows.

    Raises:
        ConfigError: naming the fields and what to change.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))
        >>> check_training(run, on_gpu=False, has_eval=False)
    """
    train = config.train
    if config.model.device.startswith("cuda:") and config.model.device != "cuda:0":
        raise ConfigError(
            f"training runs on the first GPU that is visible, and model.device is "
            f"{config.model.device}. Use device=cuda and choose the GPU with the environment "
            f"variable CUDA_VISIBLE_DEVICES={config.model.device.removeprefix('cuda:')}."
        )
    check_method(config)
    check_optimizer(train.optimizer, on_gpu=on_gpu)
    check_loggers(train.loggers)
    schedules = [schedule.value for schedule in SchedulerType]
    if train.schedule not in schedules:
        raise _unknown("schedule", train.schedule, schedules)
    if train.batch_size < 1 or train.gradient_accumulation < 1 or config.eval.batch_size < 1:
        raise ConfigError("batch sizes and gradient_accumulation must be at least 1.")
    if not 0.0 <= train.warmup_ratio < 1.0:
        raise ConfigError(f"train.warmup_ratio must be in [0, 1), got {train.warmup_ratio}.")
    if train.epochs <= 0 and train.max_steps <= 0:
        raise ConfigError("nothing to train: set train.epochs or train.max_steps above 0.")
    if train.eval_every is not None and not has_eval:
        raise ConfigError(
            "train.eval_every needs held-out rows: set data.eval, or data.eval_fraction above 0."
        )
    if train.early_stopping is not None and train.eval_every is None:
        raise ConfigError("train.early_stopping counts evaluations: set train.eval_every too.")
    if train.schedule in ("reduce_lr_on_plateau", "greedy") and train.eval_every is None:
        raise ConfigError(f"schedule {train.schedule!r} follows the held-out loss: set eval_every.")
    if train.eval_every and train.save_every and train.save_every % train.eval_every:
        raise ConfigError(
            f"train.save_every ({train.save_every}) must be a multiple of train.eval_every "
            f"({train.eval_every}), so that the best evaluated state has a checkpoint."
        )


def _schedule_kwargs(schedule: str, updates: int) -> dict[str, Any]:
    if schedule in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        return {"min_lr_rate": MIN_LR_RATE}
    if schedule == "warmup_stable_decay":
        return {"num_decay_steps": max(1, int(updates * DECAY_SHARE))}
    return {}


def _checkpointing(enabled: bool) -> dict[str, Any]:
    # Transformers 5.23 renamed gradient_checkpointing to activation_checkpointing.
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    kind = "activation" if "activation_checkpointing" in names else "gradient"
    arguments: dict[str, Any] = {f"{kind}_checkpointing": enabled}
    if enabled:
        arguments[f"{kind}_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


def training_arguments(
    config: RunConfig,
    *,
    folder: Path,
    rows: int,
    device: str,
    half: bool = False,
    autocast: torch.dtype | None = None,
    metric: str | None = None,
) -> TrainingArguments:
    """Translate a run's settings for `transformers.Trainer`.

    Args:
        config: the run; already checked by `check_training`.
        folder: where checkpoints go.
        rows: training rows, after packing.
        device: torch device of the model, such as `cpu` or `cuda:0`.
        half: the model computes in float16, so gradients need a loss scale.
        autocast: the model computes under autocast to this dtype.
        metric: held-out metric that tells the best checkpoint, such as `eval_loss`;
            None without held-out rows.

    Returns:
        The arguments; loggers except TensorBoard are in `report_to`.

    Example:
        >>> import tempfile
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))
        >>> args = training_arguments(run, folder=Path(tempfile.mkdtemp()), rows=10, device="cpu")
        >>> args.per_device_train_batch_size, args.report_to
        (8, [])
    """
    train = config.train
    updates = update_count(train, rows)
    best = metric is not None and train.eval_every is not None
    save_every = train.save_every or (train.eval_every if best else None)
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=config.eval.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        lr_scheduler_kwargs=_schedule_kwargs(train.schedule, updates),
        warmup_steps=train.warmup_ratio,  # below 1 it is a share of the updates
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        seed=train.seed,
        data_seed=train.seed,
        full_determinism=train.deterministic,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if best else "no",
        eval_steps=train.eval_every if best else None,
        save_strategy="steps" if save_every else "epoch",
        save_steps=save_every or 500,
        save_total_limit=train.keep_checkpoints,
        load_best_model_at_end=best,
        metric_for_best_model=metric if best else None,
        greater_is_better=False if best else None,
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[name for name in train.loggers if name != "tensorboard"],
        use_cpu=device == "cpu",
        fp16=(half or autocast == torch.float16) and device != "cpu",
        bf16=autocast == torch.bfloat16,
        dataloader_pin_memory=device != "cpu",
        **_checkpointing(train.gradient_checkpointing),
    )
