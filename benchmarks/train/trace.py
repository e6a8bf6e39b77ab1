"""What happens between the recorded parts of a step, from torch.profiler's trace.

A step that is replayed from a CUDA graph is one launch and thousands of kernels. What a training
loop adds to it shows in three things: kernels and copies outside the graph, calls in which the
host waits, and idle time of the GPU. A gap longer than `LONG_GAP_US` is taken for one in which the
GPU waited for the host, and the host's work in that time is named; shorter ones lie between the
kernels of a graph. The profiler slows the host down, so without it long gaps are hardly longer.
Ending a profile waits for the device too: of `cudaDeviceSynchronize` a few calls are its own.

Without a GPU there are no kernels and all of it is zero.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Event = dict[str, Any]
"""Of a Chrome trace: `name`, `cat`, `ts` and `dur` in µs, `args`."""

Row = dict[str, Any]

LONG_GAP_US = 15.0
"""Idle time that kernels in a row do not explain."""
LONGEST_KERNELS = 14
LONGEST_GAPS = 12
NAMES = 5
"""Of the host's work in a gap."""

_ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
_WORK = ("cpu_op", "user_annotation")
_ALLOCATE_OR_COPY = ("cudaMemcpy", "cudaMemcpyAsync", "cudaHostAlloc", "cudaMalloc")


def summary(events: Iterable[Event], steps: int) -> Row:
    """Calls, kernels outside graphs and idle time, per step.

    Args:
        events: `traceEvents` of a Chrome trace.
        steps: how many were profiled.

    Returns:
        Plain values; times per step, except those of single gaps.

    Example:
        >>> kernel = {"ph": "X", "cat": "kernel", "name": "k", "dur": 2.0, "args": {}}
        >>> found = summary([kernel | {"ts": 0.0}, kernel | {"ts": 3.0}], steps=2)
        >>> found["kernels"], found["outside_graph"]["kernels"], found["idle_ms"]
        (2, 1.0, 0.0005)
    """
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    device = sorted((e for e in timed if e.get("cat") in _ON_THE_GPU), key=lambda e: e["ts"])
    calls = [event for event in timed if event.get("cat") in _CALLS]
    work = [event for event in timed if event.get("cat") in _WORK]
    graphs = {e["args"].get("correlation") for e in calls if "GraphLaunch" in e["name"]}
    outside = [e for e in device if e["args"].get("correlation") not in graphs]
    telling = [e for e in calls if _tells(e["name"])]
    return {
        "steps": steps,
        "replays": len(graphs),
        "kernels": len(device),
        "calls": [
            {"name": name, "calls": count / steps, "ms": us / steps / 1e3}
            for name, count, us in _sums(telling)
        ],
        "outside_graph": {
            "kernels": len(outside) / steps,
            "ms": sum(e["dur"] for e in outside) / steps / 1e3,
            "longest": [
                {"name": name, "calls": count / steps, "us": us / steps}
                for name, count, us in _sums(outside)[:LONGEST_KERNELS]
            ],
        },
        **_idle(device, [*work, *calls], steps),
    }


def _tells(call: str) -> bool:
    """Whether the host may wait in a call, or launches a graph or a copy."""
    return "Synchronize" in call or "GraphLaunch" in call or call in _ALLOCATE_OR_COPY


def _sums(events: Iterable[Event]) -> list[tuple[str, int, float]]:
    """Name, count and microseconds, the longest first."""
    counts: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in events:
        name = event["name"][:90]
        counts[name] += 1
        spent[name] += event["dur"]
    return [(name, counts[name], us) for name, us in spent.most_common()]


def _idle(device: Sequence[Event], host: Sequence[Event], steps: int) -> Row:
    """Time between kernels, and what the host did in the long gaps."""
    gaps: list[tuple[float, float]] = []
    end = None
    for event in device:
        if end is not None and event["ts"] > end:
            gaps.append((end, event["ts"]))
        end = max(end or 0.0, event["ts"] + event["dur"])
    lengths = [after - before for before, after in gaps]
    long = [length for length in lengths if length > LONG_GAP_US]
    named = sorted(gaps, key=lambda gap: gap[0] - gap[1])[: min(len(long), LONGEST_GAPS)]
    return {
        "idle_ms": sum(lengths) / steps / 1e3,
        "long_gaps": len(long) / steps,
        "long_gaps_ms": sum(long) / steps / 1e3,
        "short_gaps_ms": (sum(lengths) - sum(long)) / steps / 1e3,
        "longest_gaps": [
            {"us": after - before, "host_us": _busy_with(host, before, after)}
            for before, after in named
        ],
    }


def _busy_with(host: Sequence[Event], before: float, after: float) -> dict[str, float]:
    """What the host did in a span; operations count with those they call."""
    found: Counter[str] = Counter()
    for event in host:
        shared = min(after, event["ts"] + event["dur"]) - max(before, event["ts"])
        if shared > 0:
            found[event["name"][:40]] += shared
    return dict(found.most_common(NAMES))


def lines(profile: Row) -> list[str]:
    """A summary for people.

    Args:
        profile: of `summary`.

    Returns:
        Lines of text.
    """
    outside = profile["outside_graph"]
    head = (
        f"profile: {profile['steps']} steps, {profile['replays']} replays, "
        f"{profile['kernels']} kernels and copies; per step:"
    )
    idle = (
        f"  idle: {profile['idle_ms']:.3f} ms; {profile['long_gaps']:.1f} gaps above "
        f"{LONG_GAP_US:.0f} us, {profile['long_gaps_ms']:.3f} ms; the short ones "
        f"{profile['short_gaps_ms']:.3f} ms"
    )
    text = [
        head,
        *(
            f"  host  {c['name']:28} {c['calls']:6.1f} x  {c['ms']:8.3f} ms"
            for c in profile["calls"]
        ),
        f"  outside the graph: {outside['kernels']:.1f} kernels and copies, {outside['ms']:.3f} ms",
        *(f"    {k['us']:8.1f} us {k['calls']:6.1f} x  {k['name']}" for k in outside["longest"]),
        idle,
    ]
    for gap in profile["longest_gaps"]:
        host = ", ".join(f"{name} {us:.0f}" for name, us in gap["host_us"].items())
        text.append(f"    {gap['us']:8.1f} us  {host}")
    return text
