"""What a run shows and checks while it trains.

`ConsoleProgress` draws one bar with loss, learning rate, tokens per second and
memory in a terminal, and writes one line per log otherwise (files, CI, pipes).
`GradientGuard` stops a run whose adapter gets no gradients or whose loss is not a
number: both fail silently elsewhere and cost a night.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qlora_kit.core.errors import AdapterError, NonFiniteError
from qlora_kit.core.memory import rss_bytes
from qlora_kit.train.config import TrainConfig
from qlora_kit.train.marks import Mark, mark

T = TypeVar("T")


def memory_bytes(device: torch.device | str) -> int:
    """Memory worth watching: the GPU's peak allocation, or this process's resident memory.

    Args:
        device: where the model computes.

    Returns:
        Bytes.

    Example:
        >>> memory_bytes("cpu") > 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return rss_bytes()


def make_progress(console: Console) -> Progress:
    """Build the bar all phases of a run share.

    Args:
        console: where it is drawn.

    Returns:
        A Rich progress display; tasks need the fields `note`.

    Example:
        >>> len(make_progress(Console(quiet=True)).columns)
        5
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(
            bar_width=24 if console.width >= 100 else 8,
            complete_style="cyan",
            finished_style="green",
        ),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
    )


class Phases:
    """Progress of the parts of a run that are plain loops: evaluation, generation.

    Example:
        >>> phases = Phases(Console(quiet=True))
        >>> list(phases.track([1, 2], "evaluate"))
        [1, 2]
    """

    def __init__(self, console: Console) -> None:
        """Remember where to draw.

        Args:
            console: the run's console.
        """
        self.console = console

    def track(self, items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while a bar advances; one line at the start where there is no terminal.

        Args:
            items: what to loop over.
            name: a word or two for the bar.
            total: number of items, if `items` has no length.

        Yields:
            The items, unchanged.
        """
        count = total if total is not None else len(items) if isinstance(items, Sequence) else None
        if not self.console.is_terminal:
            batches = "" if count is None else f", {count:,} batches"
            self.console.print(f"{name}{batches}", highlight=False, markup=False)
            yield from items
            return
        with make_progress(self.console) as progress:
            task = progress.add_task(name, total=count, note="")
            for item in items:
                yield item
                progress.advance(task)


class GradientGuard(TrainerCallback):
    """Stops a run that cannot learn: no gradient reaches the adapter, or the loss is not finite."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Remember what should receive gradients.

        Args:
            parameters: the adapter's trainable parameters, by name.
        """
        self.parameters = list(parameters)
        self.checked = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check again at the first update of each training."""
        self.checked = False

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """At the first update, refuse gradients that are all missing or all zero.

        Args:
            args: ignored.
            state: ignored.
            control: ignored.
            **kwargs: ignored.

        Raises:
            AdapterError: no trainable parameter of the adapter has a gradient.
        """
        if self.checked:
            return
        self.checked = True
        frozen = [name for name, p in self.parameters if not p.requires_grad]
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        if any(bool(gradient.any()) for gradient in gradients):
            return
        state_of = "are all zero" if gradients else "are missing"
        hint = f" {len(frozen)} of them have requires_grad=False." if frozen else ""
        raise AdapterError(
            f"no gradient reaches the adapter: after the first batch the gradients of its "
            f"{len(self.parameters)} parameters {state_of}.{hint} Check that some tokens count in "
            "the loss (qlora-kit preview), that the adapter was attached to the model that is "
            "trained, and that nothing runs under torch.no_grad()."
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a loss that is NaN or infinite.

        Args:
            args: ignored.
            state: where the run is.
            control: ignored.
            logs: values just logged.
            **kwargs: ignored.

        Raises:
            NonFiniteError: with what to change.
        """
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteError(
                f"the training loss became {loss} before update {state.global_step}. Lower "
                "train.learning_rate, keep train.max_grad_norm on, or use model.dtype=bfloat16 "
                "(float16 overflows above 65504). Checkpoints written before are untouched."
            )


class ConsoleProgress(TrainerCallback):
    """One bar in a terminal; one line per log elsewhere.

    The bar counts updates that the device has done, not those queued for it: the time it says
    is left follows from that.
    """

    def __init__(self, console: Console) -> None:
        """Remember where to write.

        Args:
            console: the run's console.
        """
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._queued: deque[tuple[int, Mark]] = deque()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if self.console.is_terminal and state.is_world_process_zero:
            self._progress = make_progress(self.console)
            self._progress.start()
            self._queued.clear()
            self._task = self._progress.add_task(
                "train", total=state.max_steps, completed=state.global_step, note=""
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar to the last update that the device has come to; does not wait."""
        if self._progress is None or self._task is None:
            return
        self._queued.append((state.global_step, mark(args.device)))
        while self._queued and self._queued[0][1].is_passed:
            self._progress.update(self._task, completed=self._queued.popleft()[0])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest values."""
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            note = training_note(logs)
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, note=note)
            else:
                self._line(f"step {state.global_step:>5}/{state.max_steps}  {note}")
        else:
            losses = {k: v for k, v in logs.items() if k.startswith("eval") and k.endswith("_loss")}
            if losses:
                parts = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
                self._line(f"step {state.global_step:>5}/{state.max_steps}  {parts}")

    def _line(self, text: str) -> None:
        console = self._progress.console if self._progress is not None else self.console
        console.print(text, highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fill the bar and close it: every update was waited for."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step)
        self.close()

    def close(self) -> None:
        """Close the bar, also after an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def training_note(logs: dict[str, float]) -> str:
    """Write one log record as a short line.

    Args:
        logs: as the Trainer logs them.

    Returns:
        Loss, learning rate, tokens per second, memory: at most about 65 characters.

    Example:
        >>> training_note({"loss": 0.5, "learning_rate": 2e-4, "tokens_per_s": 812.0})
        'loss 0.5000 · lr 2.0e-4 · 812 tok/s'
    """
    rate = f"{logs.get('learning_rate', 0.0):.1e}".replace("e-0", "e-").replace("e+00", "")
    parts = [f"loss {logs['loss']:.4f}", f"lr {rate}"]
    if "tokens_per_s" in logs:
        parts.append(f"{logs['tokens_per_s']:,.0f} tok/s")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.0%}")
    if "memory_gib" in logs:
        planned = logs.get("memory_predicted_gib")
        of = "" if planned is None else f" of {planned:.1f}"
        parts.append(f"{logs['memory_gib']:.1f}{of} GiB")
    return " · ".join(parts)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep Transformers' informational lines and bars out of a run's console.

    Example:
        >>> with quiet_transformers():
        ...     pass
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Make the TensorBoard callback write into a folder of the run.

    Args:
        folder: created when training begins.

    Returns:
        A Transformers callback.

    Example:
        >>> import tempfile
        >>> type(tensorboard_callback(Path(tempfile.mkdtemp()))).__name__
        'TensorBoardCallback'
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=os.fspath(folder)))


def extra_callbacks(config: TrainConfig, logs: Path) -> list[TrainerCallback]:
    """The callbacks that a run asks for besides its progress.

    Args:
        config: the optimization.
        logs: folder for TensorBoard.

    Returns:
        Transformers callbacks.

    Example:
        >>> extra_callbacks(TrainConfig(loggers=()), Path("logs"))
        []
    """
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in config.loggers:
        callbacks.append(tensorboard_callback(logs))
    if config.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping))
    return callbacks
