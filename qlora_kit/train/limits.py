"""What to do when memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from qlora_kit.core.errors import UserError
from qlora_kit.train.config import RunConfig


@contextmanager
def explain_memory_errors(
    config: RunConfig, plan: Callable[[], str | None] = lambda: None
) -> Iterator[None]:
    """Turn running out of memory into advice that fits the run.

    Args:
        config: the run, for what can still be lowered.
        plan: makes the planner's table and the nearest settings that fit, or None where a run
            cannot be planned; asked when memory has run out.

    Yields:
        Nothing.

    Raises:
        UserError: memory ran out in the block.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))
        >>> with explain_memory_errors(run):  # doctest: +ELLIPSIS
        ...     raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        Traceback (most recent call last):
        qlora_kit.core.errors.UserError: out of memory (tried to allocate 20 GiB). ...
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_explain(config, error, plan)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise UserError(_explain(config, error, plan)) from error


def _explain(config: RunConfig, error: RuntimeError, plan: Callable[[], str | None]) -> str:
    table = plan()
    if table is None:
        return _memory_advice(config, str(error))
    return f"out of memory ({_first(str(error))}).\n\n{table}"


def _memory_advice(config: RunConfig, message: str) -> str:
    train, advice = config.train, []
    if train.batch_size > 1:
        half = max(1, train.batch_size // 2)
        advice.append(
            f"train.batch_size={half} with train.gradient_accumulation="
            f"{train.gradient_accumulation * train.batch_size // half} (the same updates)"
        )
    if not train.gradient_checkpointing:
        advice.append("train.gradient_checkpointing=true")
    if not train.activations.startswith("offload"):
        advice.append("train.activations=offload (fused layers only)")
    if config.model.bits != 4:
        advice.append("model.bits=4")
    if train.optimizer.startswith("adamw_torch"):
        advice.append("train.optimizer=paged_adamw_8bit")
    advice.append(f"a smaller data.max_length than {config.data.max_length}")
    advice.append(f"a smaller eval.batch_size than {config.eval.batch_size}")
    return f"out of memory ({_first(message)}). Try, in this order: {'; '.join(advice)}."


def _first(message: str) -> str:
    return message.split("\n")[0].split(". ")[0].rstrip(".")
