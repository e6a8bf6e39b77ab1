"""The grid of runs that predictions are held to: shapes, sizes, policies, optimizers, methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qlora_kit.bench.record import Row
from qlora_kit.bench.recorded import most_recorded
from qlora_kit.bench.steps import RECORDED_AFTER
from qlora_kit.bench.subject import Build, Job, Point, first_fields

Sizes = tuple[int, int, str]
"""Rows of a batch, tokens of a row, activation policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model in one process."""

    model: str
    sizes: tuple[Sizes, ...]
    method: str = "lora"
    bits: int = 4
    rank: int = 16
    optimizer: str = "adamw_8bit"
    keep_decoded: int = 0
    steps: int | None = None
    """Timed ones; None for as many as the length asks for."""


_ELEMENTWISE = "recompute_elementwise"

GRID: tuple[Case, ...] = (
    Case(
        model="Gemma-3-1B",
        sizes=((1, 2048, "save"), (8, 1024, _ELEMENTWISE), (2, 8192, "recompute_all")),
    ),
    Case(
        model="Gemma-3-4B",
        sizes=((2, 2048, _ELEMENTWISE), (1, 8192, "recompute_mlp"), (4, 2048, "offload")),
    ),
    Case(
        model="Llama-3.3-70B",
        rank=32,
        sizes=((1, 512, _ELEMENTWISE), (1, 4096, "recompute_all"), (1, 8192, "offload")),
    ),
    Case(
        model="Llama-3.1-8B",
        sizes=(
            (1, 512, "save"),
            (1, 2048, _ELEMENTWISE),
            (4, 2048, "save"),
            (4, 2048, _ELEMENTWISE),
            (4, 2048, "recompute_mlp"),
            (4, 2048, "recompute_all"),
            (4, 2048, "offload_attention"),
            (4, 2048, "offload"),
            (2, 4096, "save:10,recompute_all:22"),
            (16, 512, _ELEMENTWISE),
            (1, 8192, "save:8,recompute_elementwise:16,recompute_all:8"),
            (8, 2048, "recompute_all"),
        ),
    ),
    Case(
        model="Llama-3.1-8B",
        method="lora_fa",
        optimizer="paged_adamw_8bit",
        sizes=((4, 2048, "save"), (2, 2048, "recompute_all"), (1, 4096, _ELEMENTWISE)),
    ),
    Case(
        model="Llama-3.1-8B",
        rank=64,
        optimizer="adamw_torch_fused",
        sizes=((1, 1024, "save"), (4, 1024, "recompute_mlp"), (1, 16384, "recompute_all")),
    ),
    Case(
        model="Llama-3.2-1B",
        sizes=(
            (1, 512, "save"),
            (16, 1024, "recompute_all"),
            (8, 2048, _ELEMENTWISE),
            (4, 4096, "offload"),
            (1, 65536, "offload_attention"),
        ),
    ),
    Case(
        model="Llama-3.2-1B",
        method="full",
        bits=16,
        optimizer="adamw_torch_fused",
        sizes=((1, 2048, "save"), (4, 2048, "recompute_all"), (8, 512, "save")),
    ),
    Case(
        model="Llama-3.2-3B",
        method="lora_fa",
        sizes=(
            (1, 2048, "save"),
            (4, 2048, "recompute_mlp"),
            (2, 8192, "offload_attention"),
            (16, 512, _ELEMENTWISE),
            (2, 4096, "offload"),
        ),
    ),
    Case(
        model="Llama-3.2-3B",
        bits=16,
        optimizer="paged_adamw_32bit",
        sizes=((1, 2048, "recompute_all"), (4, 1024, "save"), (2, 4096, _ELEMENTWISE)),
    ),
    Case(
        model="Qwen3-8B",
        sizes=(
            (2, 2048, "save"),
            (4, 2048, _ELEMENTWISE),
            (1, 16384, "recompute_all"),
            (4, 1024, "offload"),
        ),
    ),
    Case(
        model="Llama-3.1-8B",
        sizes=((1, 1024, _ELEMENTWISE), (4, 2048, _ELEMENTWISE)),
        keep_decoded=16,
    ),
    Case(
        model="Llama-3.2-1B",
        optimizer="adamw_torch",
        sizes=(
            (4, 2048, "recompute_mlp"),
            (1, 32768, "recompute_mlp"),
            (1, 65536, "recompute_all"),
        ),
    ),
    Case(model="Llama-3.1-8B", sizes=((1, 65536, "offload"),), steps=1),
)
"""What is known least comes first, the longest row last: time may run out."""

SMALL: tuple[Case, ...] = (Case(model="tiny", rank=8, sizes=((2, 64, "save"),)),)
"""For machines without a GPU."""


def jobs(cases: tuple[Case, ...], *, device: str, warmup: int, steps: int) -> list[Job]:
    """Jobs that measure a grid.

    Args:
        cases: of the grid.
        device: `cuda` or `cpu`.
        warmup: steps before the timed ones; more where a CUDA graph is recorded, fewer where a
            step takes seconds.
        steps: timed steps; fewer likewise.

    Returns:
        One per case, its points by growing length.
    """
    found = []
    for case in cases:
        full = case.method == "full"
        build = Build(
            impl="full" if full else "qlora_kit",
            model=case.model,
            checkpoint="",
            method=case.method,
            bits=case.bits,
            rank=case.rank,
            optimizer=case.optimizer,
            masters="float32" if full else "library",
            longest=max(seq for _, seq, _ in case.sizes),
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
        )
        ordered = sorted(case.sizes, key=lambda size: size[0] * size[1])
        points = tuple(_point(case, size, device) for size in ordered)
        found.append(Job(build=build, points=points, warmup=warmup, steps=steps))
    return found


def _point(case: Case, size: Sizes, device: str) -> Point:
    batch, seq, policy = size
    # full fine-tuning trains without graphs: see `step/graph.py`
    graph = case.method != "full" and device == "cuda" and batch * seq <= most_recorded(case.model)
    long = batch * seq >= _LONG or (case.model in _HEAVY and not graph)
    return Point(
        batch=batch,
        seq=seq,
        policy=policy,
        graph=graph,
        keep_decoded=case.keep_decoded,
        warmup=RECORDED_AFTER if graph else 0 if long else None,
        steps=case.steps or (2 if long else None),
    )


_LONG = 1 << 15
"""Tokens of a step from which on it takes seconds."""
_HEAVY = ("Llama-3.3-70B",)
"""Models whose every step does."""

_KEYS = ("model", "method", "bits", "rank", "optimizer", "batch", "seq", "policy")


def key_of(row: Row) -> tuple[object, ...]:
    """What a row measured; a step from a CUDA graph is not the same as one without.

    Args:
        row: of a record.

    Returns:
        A key, equal for the same measurement.

    Example:
        >>> row = dict.fromkeys(_KEYS, 1)
        >>> key_of(row) == key_of(row | {"keep_decoded": 0}) != key_of(row | {"graph": True})
        True
    """
    return (*(row[key] for key in _KEYS), row.get("keep_decoded", 0), bool(row.get("graph")))


def of_sizes(planned: Sequence[Job], sizes: Sequence[str]) -> list[Job]:
    """Some of the points.

    Args:
        planned: jobs.
        sizes: to keep, rows x tokens:policy.

    Returns:
        Jobs with the points that are left, in their order; none without points.

    Example:
        >>> made = jobs(GRID, device="cuda", warmup=2, steps=3)
        >>> [len(job.points) for job in of_sizes(made, ["1x65536:offload"])]
        [1]
    """
    wanted = set(sizes)
    found = []
    for job in planned:
        points = tuple(p for p in job.points if f"{p.batch}x{p.seq}:{p.policy}" in wanted)
        found += [replace(job, points=points)] if points else []
    return found


def missing(planned: Sequence[Job], rows: Sequence[Row]) -> list[Job]:
    """What rows of earlier records have not measured.

    Args:
        planned: jobs.
        rows: of those records.

    Returns:
        Jobs with the points that are left, in their order; none without points.
    """
    known = {key_of(row) for row in rows if "tokens_per_s" in row}
    found = []
    for job in planned:
        fields = [first_fields(job.build, point) | {"graph": point.graph} for point in job.points]
        pairs = zip(fields, job.points, strict=True)
        points = tuple(point for row, point in pairs if key_of(row) not in known)
        found += [replace(job, points=points)] if points else []
    return found


def together(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several records as those of one.

    Args:
        parts: of each record; where two have measured the same, the first counts.

    Returns:
        Rows: measured ones of all, and what none has measured once.
    """
    found: dict[tuple[object, ...], Row] = {}
    for measured in (True, False):
        for row in (row for rows in parts for row in rows):
            key = key_of(row)
            if ("tokens_per_s" in row) == measured and (measured or not _covered(found, key)):
                found.setdefault(key, row)
    return list(found.values())


def _covered(found: Mapping[tuple[object, ...], Row], key: tuple[object, ...]) -> bool:
    """Whether a row that was not measured was elsewhere, with a CUDA graph or without."""
    return any((*key[:-1], graph) in found for graph in (False, True))
