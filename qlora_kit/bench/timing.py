"""Timing several variants of one computation beside each other.

A variant is a CUDA graph of many calls, so that the host's time does not count. All
variants are replayed in turn, in an order that rotates from round to round, and
medians over the rounds are compared: the card is power capped, and whoever runs
first on a cold card looks fast. A round is queued behind a short delay, so that the
GPU never waits for the host between two events. Without a GPU the calls run as they
are, timed by the clock: that tests the benchmark, not the code.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from qlora_kit.bench.turns import alone

Call = Callable[[int], object]
"""Runs a variant on the i-th set of weights."""
Replay = Callable[[], None]

FEWEST_ROUNDS = 7
MOST_ROUNDS = 41
_WARM_ROUNDS = 2
_DELAY_CYCLES = 500_000  # about 0.3 ms


def device() -> str:
    """Where benchmarks run: `cuda` if there is a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Captured:
    """Variants captured one after the other, their memory shared."""

    def __init__(self, *, graphs: bool = True) -> None:
        """Nothing is captured yet.

        Args:
            graphs: replay CUDA graphs; False to call variants as they are, launches included.
        """
        self.replays: dict[str, Replay] = {}
        self.first: dict[str, object] = {}
        """What each variant's first call returned, uncaptured."""
        self._gpu = device() == "cuda"
        self._stream = _stream() if self._gpu and graphs else None
        # Results are dropped as soon as they are written, so graphs may share their memory.
        self._pool = torch.cuda.graph_pool_handle() if self._stream else None

    def add(self, name: str, call: Call, calls: int, copies: int) -> None:
        """Capture one variant.

        Args:
            name: what it is called in the results.
            call: the variant.
            calls: how many calls one replay makes.
            copies: how many sets of weights they rotate over.
        """
        if self._stream is None:
            self.first[name] = call(0)
            self.replays[name] = lambda: _run(call, calls, copies)
            return
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream), torch.no_grad():
            self.first[name] = call(0)
            torch.cuda.synchronize()
            # Not `torch.cuda.graph`: it gives all cached memory back first, each time.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool)
            _run(call, calls, copies)
            graph.capture_end()
        self.replays[name] = graph.replay

    def time(self, calls: int, seconds: float) -> dict[str, list[float]]:
        """Time all variants in turn.

        Args:
            calls: how many calls one replay makes.
            seconds: about how long to take.

        Returns:
            Sorted milliseconds per call of each variant, one entry a round.
        """
        start = time.perf_counter()
        for index in range(_WARM_ROUNDS):
            self._round(index)
        spent = time.perf_counter() - start
        wanted = int((seconds - spent) / (spent / _WARM_ROUNDS))
        times: dict[str, list[float]] = {name: [] for name in self.replays}
        for index in range(min(MOST_ROUNDS, max(FEWEST_ROUNDS, wanted))):
            for name, ms in self._round(index).items():
                times[name].append(ms / calls)
        return {name: sorted(values) for name, values in times.items()}

    def _round(self, index: int) -> dict[str, float]:
        """Milliseconds of one replay of each variant."""
        names = list(self.replays)
        shift = index % len(names)
        names = names[shift:] + names[:shift]
        if not self._gpu:
            return {name: _clock(self.replays[name]) for name in names}
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in names}
        torch.cuda._sleep(_DELAY_CYCLES)
        for name, (begin, end) in events.items():
            begin.record()
            self.replays[name]()
            end.record()
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) for name, (begin, end) in events.items()}


_STREAMS: list[torch.cuda.Stream] = []


def _stream() -> torch.cuda.Stream:
    """The one stream of all captures: cuBLAS keeps a workspace for each."""
    if not _STREAMS:
        _STREAMS.append(torch.cuda.Stream())
    return _STREAMS[0]


def _run(call: Call, calls: int, copies: int) -> None:
    for i in range(calls):
        call(i % copies)


def _clock(replay: Replay) -> float:
    start = time.perf_counter()
    replay()
    return (time.perf_counter() - start) * 1e3


def spread(values: list[float]) -> dict[str, float]:
    """Median and spread of sorted milliseconds, as records name them."""
    return {
        "ms_median": statistics.median(values),
        "ms_p10": values[len(values) // 10],
        "ms_p90": values[-1 - len(values) // 10],
    }


def peaks() -> dict[str, float]:
    """Rates this machine sustains: bf16 products of 8192³ and copies of a GiB.

    Returns:
        `bf16_tflops`, and `copy_tbs` counting bytes read and bytes written: the
        better of the driver's copy and a kernel's.
    """
    gpu = device() == "cuda"
    size, count = (8192, 2**30) if gpu else (256, 2**20)
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in "ab")
    source = torch.randint(100, (count // 4,), device=device(), dtype=torch.int32)
    target = torch.empty_like(source)
    calls: dict[str, tuple[Call, int]] = {
        "product": (lambda _: a @ b, 10),
        "copy": (lambda _: target.copy_(source), 5),
        "kernel": (lambda _: torch.add(source, 1, out=target), 5),
    }
    ms = {}
    for name, (call, repeats) in calls.items():
        captured = Captured()
        captured.add(name, call, repeats, 1)
        captured.time(repeats, 0.7 if gpu else 0.0)  # until the card is warm
        ms[name] = statistics.median(captured.time(repeats, 0.7 if gpu else 0.0)[name])
    return {
        "bf16_tflops": 2 * size**3 / ms["product"] / 1e9,
        "copy_tbs": 2 * count / min(ms["copy"], ms["kernel"]) / 1e9,
    }


if __name__ == "__main__":
    with alone():
        print(json.dumps(peaks()))
