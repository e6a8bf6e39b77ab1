"""How much host memory this process holds, for reports and for bounds in tests.

Resident memory counts pages of memory-mapped files too, and the kernel drops
those at will. What a bound is about is *anonymous* memory, which only this
process can give back; Linux tells both apart in /proc/self/status.
"""

import threading
from pathlib import Path
from types import TracebackType

import psutil

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Memory only this process can free, in bytes: heap and private pages, no mapped files.

    Returns:
        `RssAnon` on Linux; the resident set elsewhere, which is an upper bound.

    Example:
        >>> anonymous_bytes() > 0
        True
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return rss_bytes()


def rss_bytes() -> int:
    """Resident memory of this process in bytes, mapped files included.

    Returns:
        The resident set size.

    Example:
        >>> rss_bytes() > 0
        True
    """
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Samples anonymous memory in a thread while a block runs.

    Attributes:
        start_bytes: anonymous memory at the start.
        peak_bytes: the highest sample, start and end included.

    Example:
        >>> with PeakMemory() as memory:
        ...     block = bytearray(50_000_000)
        >>> memory.peak_bytes >= memory.start_bytes  # a long-lived process may reuse freed memory
        True
    """

    def __init__(self, interval_s: float = 0.005) -> None:
        """Prepare to sample.

        Args:
            interval_s: seconds between samples; shorter peaks can be missed.
        """
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.start_bytes = 0
        self.peak_bytes = 0

    @property
    def growth_bytes(self) -> int:
        """Peak minus start."""
        return self.peak_bytes - self.start_bytes

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __enter__(self) -> "PeakMemory":
        """Take the first sample and start the thread."""
        self.start_bytes = self.peak_bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the thread and take the last sample."""
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
