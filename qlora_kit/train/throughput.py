"""Tokens per second of a training, with what is not training left out.

Tokens are counted on the device and read with the log line they belong to, so that counting
never makes the host wait. Time is the device's, between marks in its work (`marks.py`): the
host queues updates faster than a GPU does them, and reads lines later than they were due.
Evaluations and checkpoints run inside `outside()` and do not count.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.train.marks import Mark, mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Updates between two log lines."""

    start: Mark
    """Where the one before ended."""
    end: Mark
    """Behind its last update."""
    pauses: tuple[tuple[Mark, Mark], ...]
    """Starts and ends of what was no training."""
    counted: int
    """Tokens that were read before its end."""

    def seconds(self) -> float:
        """Time the device trained; waits until it has come to the end.

        Returns:
            Seconds, pauses left out.

        Example:
            >>> pauses = ((Mark(2.0), Mark(5.0)),)
            >>> Window(start=Mark(1.0), end=Mark(6.0), pauses=pauses, counted=0).seconds()
            2.0
        """
        return self.end.since(self.start) - sum(end.since(start) for start, end in self.pauses)


class Throughput:
    """Counts tokens and time.

    Attributes:
        widest: rows and tokens of each of the largest batch so far, padding included.

    Example:
        >>> speed = Throughput()
        >>> speed.count(torch.ones(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]]))
        >>> speed.flush()
        5
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Start the clock.

        Args:
            device: whose time is taken.
        """
        self._device = device
        self.widest = (0, 0)
        self._on_device: Tensor | None = None
        self._known = 0
        self._start = mark(device)
        self._counted = 0
        self._pauses: list[tuple[Mark, Mark]] = []
        self._timed_tokens = 0
        self._timed_s = 0.0

    def start(self) -> None:
        """Start the clock again."""
        self._start, self._pauses = mark(self._device), []

    def count(self, ids: Tensor, mask: Tensor | None) -> None:
        """Count a batch's tokens.

        Args:
            ids: (B, T).
            mask: (B, T), 0 at padding; None, or of another shape, counts all.
        """
        if ids.numel() > self.widest[0] * self.widest[1]:
            self.widest = (ids.shape[0], ids.shape[1])
        if mask is None or mask.shape != ids.shape:
            self._known += ids.numel()
        else:
            new = mask.sum()
            self._on_device = new if self._on_device is None else self._on_device + new

    def take(self) -> Tensor:
        """Start another count, without waiting for the device.

        Returns:
            () int64, tokens of the count until now.
        """
        known, counted = self._known, self._on_device
        self._known, self._on_device = 0, None
        return torch.tensor(known) if counted is None else counted + known

    def flush(self) -> int:
        """Read the count, which waits for the device.

        Returns:
            Tokens since the last reading.
        """
        tokens = int(self.take())
        self._counted += tokens
        return tokens

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Time spent here does not count."""
        start = mark(self._device)
        try:
            yield
        finally:
            self._pauses.append((start, mark(self._device)))

    def close(self) -> Window:
        """End a window behind the work queued so far and begin the next; does not wait.

        Returns:
            The window, for `rate` once its tokens have been read.
        """
        end = mark(self._device)
        window = Window(
            start=self._start, end=end, pauses=tuple(self._pauses), counted=self._counted
        )
        self._start, self._pauses, self._counted = end, [], 0
        return window

    def rate(self, window: Window, tokens: int) -> float:
        """Tokens per second of a window; waits for its end.

        Args:
            window: that was closed.
            tokens: read off what `take` gave at its end.

        Returns:
            The rate, of these and of the tokens that were flushed in it.
        """
        elapsed, tokens = window.seconds(), tokens + window.counted
        self._timed_tokens += tokens
        self._timed_s += elapsed
        return round(tokens / max(elapsed, 1e-9), 1)

    def mean(self, history: Sequence[dict[str, Any]]) -> float:
        """Tokens per second over all windows.

        Args:
            history: log lines, for a training that was resumed after its last update.

        Returns:
            The mean.
        """
        if self._timed_s > 0:
            return round(self._timed_tokens / self._timed_s, 1)
        logged = [entry["tokens_per_s"] for entry in history if "tokens_per_s" in entry]
        return round(sum(logged) / max(1, len(logged)), 1)
