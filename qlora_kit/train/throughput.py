"""Tokens per second of a training, with what is not training left out.

Tokens are counted on the device and read with the log line they belong to, so that counting
never makes the host wait. Evaluations and checkpoints run inside `outside()` and do not count.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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

    def __init__(self) -> None:
        """Start the clock."""
        self.widest = (0, 0)
        self._on_device: Tensor | None = None
        self._known = 0
        self._mark_s = time.perf_counter()
        self._window_tokens = 0
        self._paused_s = 0.0
        self._timed_tokens = 0
        self._timed_s = 0.0

    def start(self) -> None:
        """Start the clock again."""
        self._mark_s, self._paused_s = time.perf_counter(), 0.0

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
            () int64, tokens of the count until now, for `add` once it has been read.
        """
        known, counted = self._known, self._on_device
        self._known, self._on_device = 0, None
        return torch.tensor(known) if counted is None else counted + known

    def add(self, tokens: int) -> int:
        """Count a reading of what `take` gave.

        Args:
            tokens: read.

        Returns:
            The same number.
        """
        self._window_tokens += tokens
        return tokens

    def flush(self) -> int:
        """Read the count, which waits for the device.

        Returns:
            Tokens since the last reading.
        """
        return self.add(int(self.take()))

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Time spent here does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - start

    def window(self) -> float:
        """Tokens per second since the last call, of tokens that were flushed."""
        now = time.perf_counter()
        elapsed = now - self._mark_s - self._paused_s
        rate = round(self._window_tokens / max(elapsed, 1e-9), 1)
        self._timed_tokens += self._window_tokens
        self._timed_s += elapsed
        self._mark_s, self._window_tokens, self._paused_s = now, 0, 0.0
        return rate

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
