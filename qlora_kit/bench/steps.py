"""Training steps, timed and weighed, the same for every library.

First one step whose labels are all but a few ignored: its loss says whether two
libraries compute the same thing (the mean over thousands of random tokens would not:
any random model gives nearly the same), and it pays for compiling. Then warm-up steps
and timed ones on full labels. On a GPU events mark the ends of steps and nothing waits
for the host in between, so a step takes what it takes in a training loop; without a GPU
the clock does, which tests the benchmark and nothing else.

Memory is counted from the first step on, so what compiling and tuning took is in it.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qlora_kit.bench.profile import Breakdown, profile_steps
from qlora_kit.bench.subject import Batch, Stage, Subject
from qlora_kit.bench.turns import alone
from qlora_kit.core.pinned import registered_peak_bytes

GIB = 2**30
CHECK_POSITIONS = 64
"""Labels of the first step: the mean of so many losses differs between unrelated models by 0.2."""
BATCHES = 4
"""Different batches; the steps take them in turn."""
PROFILED_STEPS = 2
RECORDED_AFTER = 3
"""Steps after which a CUDA graph of a repeating shape has been recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the steps of one point gave."""

    step_ms: tuple[float, ...]
    """Timed steps, in order."""
    first_step_s: float
    """The first step, compiling included."""
    check_loss: float
    """Mean loss of the few labels of the first step, before anything was learned."""
    losses: tuple[float, ...]
    """Of the steps on full labels, warm-up included."""
    breakdown: Breakdown | None
    """Where a step's time goes, if asked for."""

    @property
    def last_loss(self) -> float:
        """Of the last timed step."""
        return self.losses[-1]

    @property
    def median_ms(self) -> float:
        """Median of the timed steps."""
        return statistics.median(self.step_ms)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU has no memory left, in any library's words.

    Args:
        error: any.

    Returns:
        True for torch's own error and for what cuBLAS, cuDNN and drivers say.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ..."))
        True
        >>> is_out_of_memory(RuntimeError("shapes do not fit"))
        False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "alloc_failed" in text)


def make_batches(vocab_size: int, batch: int, seq: int, seed: int, device: str) -> list[Batch]:
    """Random tokens; labels are the inputs. The first batch is the one for the check.

    Args:
        vocab_size: tokens are below it and above the first three.
        batch: rows.
        seq: tokens per row.
        seed: the same gives the same tokens everywhere.
        device: where they go.

    Returns:
        1 + `BATCHES` batches of `input_ids` and `labels`.

    Example:
        >>> check, *rest = make_batches(512, 2, 64, 0, "cpu")
        >>> int((check["labels"] != -100).sum()), len(rest), rest[0]["labels"].shape
        (64, 4, torch.Size([2, 64]))
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(1 + BATCHES):
        ids = torch.randint(3, vocab_size, (batch, seq), generator=generator)
        found.append({"input_ids": ids, "labels": ids.clone()})
    few = torch.randperm(batch * (seq - 1), generator=generator)[:CHECK_POSITIONS]
    labels = torch.full((batch, seq), -100)
    rows, columns = few // (seq - 1), few % (seq - 1) + 1
    labels[rows, columns] = found[0]["input_ids"][rows, columns]
    found[0]["labels"] = labels
    return [{key: value.to(device) for key, value in one.items()} for one in found]


class StepClock:
    """Marks the ends of steps; the time between two marks is a step."""

    def __init__(self, device: str) -> None:
        """Choose events or the clock.

        Args:
            device: `cuda` or `cpu`.
        """
        self._gpu = device == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Here one step ends and the next begins; the host does not wait."""
        if self._gpu:  # needs a GPU
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def step_ms(self) -> list[float]:
        """Milliseconds between marks; waits for the last one."""
        if self._gpu:  # needs a GPU
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairwise(self._events)]
        return [(b - a) * 1e3 for a, b in pairwise(self._times)]


def _turns(batches: Sequence[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def timed_steps(
    subject: Subject, batches: Sequence[Batch], warmup: int, steps: int, device: str
) -> tuple[list[float], list[float]]:
    """Milliseconds of `steps` steps after `warmup` ones, and the losses of all of them."""
    clock, turns = StepClock(device), _turns(batches)
    losses: list[Tensor] = []
    for index in range(warmup + steps):
        if index == warmup:
            clock.mark()
        losses.append(subject.step(next(turns)))
        if index >= warmup:
            clock.mark()
    return clock.step_ms(), [float(loss) for loss in losses]


def measure(
    subject: Subject,
    batches: Sequence[Batch],
    *,
    warmup: int,
    steps: int,
    device: str,
    stage: Stage,
    profile_rank: int | None = None,
    vocab_size: int = 0,
) -> Measured:
    """Run the steps of one point.

    Args:
        subject: prepared for the point's policy.
        batches: as `make_batches` gives them.
        warmup: steps that are not timed, after the first one.
        steps: timed ones.
        device: `cuda` or `cpu`.
        stage: told when first step, warm-up and timing end.
        profile_rank: the adapter's rank, to take a profile too; None for none.
        vocab_size: tells the loss's kernels in the profile.

    Returns:
        Times and losses.
    """
    check, *rest = batches
    began = time.perf_counter()
    check_loss = float(subject.step(check))
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - began
    stage("first step", f"{first:.1f} s, loss {check_loss:.4f}")
    with alone():
        milliseconds, losses = timed_steps(subject, rest, warmup, steps, device)
        stage("timed steps", f"{statistics.median(milliseconds):.1f} ms, loss {losses[-1]:.4f}")
        breakdown = None
        if profile_rank is not None:
            turns = _turns(rest)

            breakdown = profile_steps(
                lambda: subject.step(next(turns)),
                steps=PROFILED_STEPS,
                step_ms=statistics.median(milliseconds),
                rank=profile_rank,
                vocab_size=vocab_size,
            )
            stage("profile")
    return Measured(
        step_ms=tuple(milliseconds),
        first_step_s=first,
        check_loss=check_loss,
        losses=tuple(losses),
        breakdown=breakdown,
    )


def start_counting(cap_gib: float | None) -> None:
    """Free what is cached, set the cap, and count GPU memory anew. Nothing without a GPU.

    Args:
        cap_gib: what torch may take; None for all of it.
    """
    gc.collect()
    if not torch.cuda.is_available():
        return
    # cuBLAS's workspaces, one per stream, would be those of the points before
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    share = 1.0 if cap_gib is None else min(1.0, cap_gib * GIB / total)
    torch.cuda.set_per_process_memory_fraction(share)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_peak_host_memory_stats()
    registered_peak_bytes(reset=True)


def gpu_memory() -> dict[str, object]:
    """Peaks since `start_counting`, as records name them; None without a GPU."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("peak_allocated_gib", "peak_reserved_gib", "pinned_gib"))
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    pinned += registered_peak_bytes()
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "pinned_gib": pinned / GIB,
    }
