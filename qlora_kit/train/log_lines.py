"""Log lines of a training, read when the device has them, not when they are due.

Reading a loss waits for the step that makes it, and until the host has prepared the next one
the GPU has nothing to do. So on a GPU a line that is due is copied to pinned memory behind its
step, and read after the next update has been queued: the host waits for numbers while the GPU
works. A line says what it always said, under the step it belongs to; it appears one update
later, and with it what follows from it, such as the refusal of a loss that is not a number.
Speed is by the GPU's clock, from line to line (`throughput.py`), not by when lines are read.

Nothing overtakes a line: it is read at once where an evaluation, a checkpoint or the end of the
training comes next. On a CPU, where values are there when they are made, every line is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from qlora_kit.core.units import GIB
from qlora_kit.train.callbacks import memory_bytes
from qlora_kit.train.expected import Expected
from qlora_kit.train.throughput import Throughput, Window
from qlora_kit.train.update import UpdatingTrainer

Values = dict[str, Tensor | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line, on its way to the host."""

    step: int
    """Updates so far when it was due."""
    epoch: float | None
    """As the Trainer counts them."""
    updates: int
    """Over which the loss is a sum."""
    values: Values
    """`loss`, `tokens` and others by name; tensors are () and on the host when `arrived`."""
    window: Window
    """In which its tokens were trained."""
    memory: int
    """Bytes, as `memory_bytes` counts them."""
    start_time: float
    """Of the training."""
    arrived: torch.cuda.Event | None
    """Behind the copies; None: the values are there."""

    def read(self) -> dict[str, float]:
        """Wait for the values.

        Returns:
            Plain numbers.
        """
        if self.arrived is not None:  # needs a GPU
            self.arrived.synchronize()
        return {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in self.values.items()
        }


def let_run_ahead(args: TrainingArguments) -> None:
    """Settle what would make the host wait in every update.

    One process drives one GPU: a second visible one would mean DataParallel. A batch is copied
    from pinned memory without waiting, or fetching it would wait for every step queued before.
    And Transformers' filter of losses that are not finite, which reads each of them twice, is
    off: it would also hide them from `GradientGuard`.

    Args:
        args: of a training. Modified.

    Example:
        >>> args = TrainingArguments("out", use_cpu=True, report_to=[])
        >>> args.dataloader_pin_memory = True  # as on a GPU
        >>> let_run_ahead(args)
        >>> args.accelerator_config.non_blocking, args.logging_nan_inf_filter
        (True, False)
    """
    if args.n_gpu > 1:
        args._n_gpu = 1
    args.logging_nan_inf_filter = False
    if args.dataloader_pin_memory:
        args.accelerator_config.non_blocking = True


def sent_to_host(values: Values) -> tuple[Values, torch.cuda.Event | None]:
    """Copy values to the host without waiting for them.

    Args:
        values: () tensors on one device, or numbers.

    Returns:
        sent: copies in host memory, pinned where they come from a GPU.
        arrived: recorded behind the copies; None where there is nothing to wait for.

    Example:
        >>> sent_to_host({"loss": torch.tensor(2.0), "rate": 0.5})
        ({'loss': tensor(2.), 'rate': 0.5}, None)
    """
    sent: Values = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            own = value.detach()
            sent[name] = own.to("cpu", non_blocking=True) if own.is_cuda else own.clone()
        else:
            sent[name] = value
    if any(isinstance(value, Tensor) and value.is_cuda for value in values.values()):
        return sent, _now()
    return sent, None


def _now() -> torch.cuda.Event:  # needs a GPU
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


class LoggingTrainer(UpdatingTrainer):
    """A Trainer whose log lines carry throughput and memory, and never hold the GPU up.

    Attributes:
        throughput: tokens per second.
        expected: what MFU and planned memory follow from, or None.
        logs_late: whether a line is read after the next update has been queued.
    """

    throughput: Throughput
    expected: Expected | None
    logs_late: bool = False
    _globalstep_last_logged: int
    _line: LogLine | None = None

    @property
    def mean_tokens_per_s(self) -> float:
        """Tokens per second over the logged updates, evaluations and checkpoints left out."""
        return self.throughput.mean(self.state.log_history)

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        due = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        self._write_line()  # of an earlier update
        if due:
            self._line = self._take_line(tr_loss, grad_norm, learning_rate, start_time)
            self._globalstep_last_logged = self.state.global_step
            self.control.should_log = False
        now = self.control
        waits = now.should_evaluate or now.should_save
        if waits or now.should_training_stop or now.should_epoch_stop or not self.logs_late:
            self._write_line()
        super()._maybe_log_save_evaluate(
            tr_loss,
            grad_norm,
            model,
            trial,
            epoch,
            ignore_keys_for_eval,
            start_time,
            learning_rate=learning_rate,
        )

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._write_line()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _take_line(
        self,
        loss: Tensor,
        grad_norm: Tensor | float | None,
        learning_rate: float | None,
        start_time: float,
    ) -> LogLine:
        """Send a line's values to the host, and start the next sum of losses and tokens."""
        mean = self.accelerator.gather(loss).mean() if self.args.world_size > 1 else loss
        rate = self._get_learning_rate() if learning_rate is None else learning_rate
        values: Values = {"loss": mean}
        if grad_norm is not None:
            values["grad_norm"] = grad_norm
        values |= {"learning_rate": rate, **self.own_values(), "tokens": self.throughput.take()}
        window = self.throughput.close()
        sent, arrived = sent_to_host(values)
        loss.zero_()
        return LogLine(
            step=self.state.global_step,
            epoch=self.state.epoch,
            updates=self.state.global_step - self._globalstep_last_logged,
            values=sent,
            window=window,
            memory=memory_bytes(self.args.device),
            start_time=start_time,
            arrived=arrived,
        )

    def _write_line(self) -> None:
        """Read the line that is on its way, if there is one, and hand it to the loggers."""
        line, self._line = self._line, None
        if line is None:
            return
        logs = line.read()
        self._total_loss_scalar += logs["loss"]
        logs["loss"] /= line.updates
        tokens = int(logs.pop("tokens"))
        self.state.num_input_tokens_seen += tokens
        logs["tokens_per_s"] = self.throughput.rate(line.window, tokens)
        logs["tokens"] = self.state.num_input_tokens_seen
        logs["memory_gib"] = round(line.memory / GIB, 3)
        if self.expected is not None:
            logs |= self.expected.logs(logs["tokens_per_s"])
        self.store_flos()
        here = self.state.global_step, self.state.epoch
        self.state.global_step, self.state.epoch = line.step, line.epoch
        try:
            self.log(logs, line.start_time)
        finally:
            self.state.global_step, self.state.epoch = here

    def _flush_tokens(self) -> None:
        """Count what was trained since the last line, before the state is saved."""
        self.state.num_input_tokens_seen += self.throughput.flush()
