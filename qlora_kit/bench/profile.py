"""Where a training step's time goes, by the names of the kernels that ran.

torch.profiler gives every kernel with its start and end, and for those that torch itself
launched the operation with its shapes. The name decides the category; shapes decide two
things that names do not tell: a matrix product with a side no longer than a few ranks is
LoRA's, and what runs over the vocabulary is the loss. Categories add up to the time the
GPU was busy (kernels side by side on two streams count twice there); the gap is what is
left of an *unprofiled* step, since the profiler slows the host down. In a CUDA graph no
operation launches anything, so there names alone decide.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

CATEGORIES = (
    "gemm",
    "dequantize",
    "attention",
    "elementwise",
    "loss",
    "lora",
    "optimizer",
    "copies",
    "other",
)
"""In the order they are printed; `gaps` follows."""

SKINNY_RANKS = 4
"""A product is LoRA's if a side is at most so many ranks (q, k, v and a spare together)."""

_ELEMENTWISE = (
    r"elementwise|reduce|norm|rope|rotary|silu|glu|activation|embedding|index|gather|scatter"
    r"|softmax|scan|^triton_|functor"
)
_RULES: tuple[tuple[str, str], ...] = (
    ("optimizer", r"optimizer|adam|multi_tensor|lpnorm|foreach"),
    ("dequantize", r"dequant"),
    ("lora", r"low_rank|lora"),
    ("loss", r"cross_?entropy|log_?soft_?max|logsumexp|nll_loss|cunn_softmax"),
    ("elementwise", r"^triton_(poi|per|red|mix)_"),
    ("attention", r"flash|fmha|sdpa|attention|attn|flex"),
    ("copies", r"^mem(cpy|set)|copy_kernel|batchedcopy|fillfunctor"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|split_?k|wgmma|gemv|cublas|^triton_tem_|^nf4_(?!quantize)"),
    ("elementwise", _ELEMENTWISE),
)
_COMPILED = tuple((category, re.compile(pattern, re.IGNORECASE)) for category, pattern in _RULES)
_PRODUCTS = re.compile(r"(^|::)(mm|addmm|bmm|baddbmm|linear|matmul|_scaled_mm)(_out)?$")


def classify(kernel: str) -> str:
    """Category of a kernel by its name alone.

    Args:
        kernel: as the profiler prints it.

    Returns:
        One of `CATEGORIES`.

    Example:
        >>> classify("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"), classify("Memcpy DtoH")
        ('gemm', 'copies')
    """
    return next((name for name, rule in _COMPILED if rule.search(kernel)), "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRun:
    """One kernel on the GPU."""

    name: str
    start_us: float
    end_us: float
    op: str = ""
    """The torch operation that launched it, if known."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of that operation's tensors."""


@dataclass(slots=True, kw_only=True)
class Breakdown:
    """Milliseconds per step by category, and the kernels behind them."""

    step_ms: float
    """Of an unprofiled step."""
    busy_ms: float
    """Time in which at least one kernel ran."""
    category_ms: dict[str, float] = field(default_factory=dict)
    """Every category, and `gaps`."""
    kernels: list[dict[str, object]] = field(default_factory=list)
    """The longest ones: name, category, calls and ms per step."""


def category_of(run: KernelRun, *, rank: int, vocab_size: int) -> str:
    """Category of a kernel by its name, corrected by the shapes it was launched with.

    Args:
        run: the kernel.
        rank: of the adapter.
        vocab_size: of the head.

    Returns:
        One of `CATEGORIES`.

    Example:
        >>> run = KernelRun(name="nvjet_64x8", start_us=0, end_us=1, op="aten::mm",
        ...                 shapes=((8192, 4096), (4096, 16)))
        >>> category_of(run, rank=16, vocab_size=128256)
        'lora'
    """
    category = classify(run.name)
    sides = [side for shape in run.shapes for side in shape[-2:] if len(shape) >= 2]
    if category == "gemm" and _PRODUCTS.search(run.op) and sides:
        return "lora" if min(sides) <= SKINNY_RANKS * rank else category
    if category in ("elementwise", "copies", "other") and any(
        shape and shape[-1] == vocab_size and len(shape) >= 2 for shape in run.shapes
    ):
        return "loss"
    return category


def busy_us(runs: Iterable[KernelRun]) -> float:
    """Microseconds in which at least one kernel ran.

    Args:
        runs: in any order; they may overlap.

    Returns:
        Length of the union of their intervals.

    Example:
        >>> busy_us([KernelRun(name="a", start_us=0, end_us=2),
        ...          KernelRun(name="b", start_us=1, end_us=3)])
        3.0
    """
    total, reached = 0.0, float("-inf")
    for run in sorted(runs, key=lambda run: run.start_us):
        total += max(0.0, run.end_us - max(run.start_us, reached))
        reached = max(reached, run.end_us)
    return total


def break_down(
    runs: Sequence[KernelRun], *, steps: int, step_ms: float, rank: int, vocab_size: int
) -> Breakdown:
    """Add up kernels by category.

    Args:
        runs: all kernels of the profiled steps.
        steps: how many those were.
        step_ms: of an unprofiled step.
        rank: of the adapter.
        vocab_size: of the head.

    Returns:
        Milliseconds per step; the twenty longest kernels.
    """
    sums: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    by_kernel: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        category = category_of(run, rank=rank, vocab_size=vocab_size)
        sums[category] += (run.end_us - run.start_us) / 1e3 / steps
        by_kernel[run.name, category].append((run.end_us - run.start_us) / 1e3 / steps)
    busy = busy_us(runs) / 1e3 / steps
    longest = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:20]
    return Breakdown(
        step_ms=step_ms,
        busy_ms=busy,
        category_ms={**sums, "gaps": max(0.0, step_ms - busy)},
        kernels=[
            {
                "name": name[:120],
                "category": category,
                "calls": len(times) / steps,
                "ms": sum(times),
            }
            for (name, category), times in longest
        ],
    )


def kernel_runs(events: Iterable[Any]) -> list[KernelRun]:
    """The kernels among a profiler's events, with the operations that launched them.

    An operation knows its kernels by name and duration only, so each of them is matched
    to the next run of that name and duration.

    Args:
        events: `torch.profiler.profile().events()`.

    Returns:
        One entry per kernel, copy or fill on the GPU.
    """
    found = list(events)
    launched: dict[tuple[str, float], list[tuple[str, tuple[tuple[int, ...], ...]]]]
    launched = defaultdict(list)
    for event in found:
        for kernel in getattr(event, "kernels", ()):
            shapes = tuple(
                tuple(shape)
                for shape in event.input_shapes or ()
                if shape and all(isinstance(side, int) for side in shape)
            )
            launched[kernel.name, round(float(kernel.duration), 2)].append((event.name, shapes))
    runs = []
    for event in found:
        # The profiler also puts its own annotations and our operations' spans on the GPU's line.
        annotation = getattr(event, "is_user_annotation", False)
        if event.device_type != torch.autograd.DeviceType.CUDA or annotation:
            continue
        start, end = float(event.time_range.start), float(event.time_range.end)
        who = launched.get((event.name, round(end - start, 2)))
        op, shapes = who.pop(0) if who else ("", ())
        runs.append(KernelRun(name=event.name, start_us=start, end_us=end, op=op, shapes=shapes))
    return runs


def profile_steps(
    step: Callable[[], object], *, steps: int, step_ms: float, rank: int, vocab_size: int
) -> Breakdown | None:
    """Profile some steps.

    Args:
        step: one training step, warmed up.
        steps: how many.
        step_ms: of an unprofiled step.
        rank: of the adapter.
        vocab_size: of the head.

    Returns:
        The breakdown; None without a GPU, where there are no kernels.
    """
    if not torch.cuda.is_available():
        step()
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    runs = kernel_runs(profiler.events())
    return break_down(runs, steps=steps, step_ms=step_ms, rank=rank, vocab_size=vocab_size)
