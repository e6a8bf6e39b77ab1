"""What a benchmark measures: methods x models x batch x sequence x policy, as jobs.

A job is a model and a method, built once; its points are measured one after the other in that
process, each with the caches emptied and the counters of memory set to zero before it. With
`fresh` every point gets a process of its own. Full fine-tuning is measured with both loss
heads, and by the two policies the model's own code knows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from transformers.training_args import OptimizerNames

from qlora_kit.bench.full import HEADS
from qlora_kit.bench.methods import ALL, METHODS, PEERS, Method
from qlora_kit.bench.record import Row
from qlora_kit.bench.recorded import most_recorded
from qlora_kit.bench.rows import identity, measured
from qlora_kit.bench.subject import Build, Job, Point, first_fields
from qlora_kit.block.policy import POLICIES
from qlora_kit.core.errors import ConfigError

OWN_POLICIES = ("recompute_all", "save")
"""Those of a model's own code."""

GRAPHS = ("off", "on", "both")
"""Small batches as CUDA graphs: no, as the Trainer does (and full fine-tuning likewise), or each
by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user chose; sizes of batches in rows, of sequences in tokens."""

    models: tuple[str, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    batches: tuple[int, ...] = (1,)
    seqs: tuple[int, ...] = (2048,)
    policies: tuple[str, ...] = OWN_POLICIES
    """Ours; `save` stands for every policy that recomputes no product."""
    graphs: str = "off"
    """One of `GRAPHS`."""
    rank: int = 16
    optimizer: str | None = None
    """Of adapters; None for each method's own."""
    cap_gib: float | None = None
    """GPU memory torch may take."""
    warmup: int = 3
    steps: int = 3
    fresh: bool = True
    device: str = "cuda"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Refuse names that nobody knows.

        Raises:
            ConfigError: a method, policy, optimizer or `graphs` is unknown, or a size is below 1.
        """
        for name in self.methods:
            if name not in ALL:
                raise ConfigError(f"unknown method {name!r}; known: {', '.join(ALL)}.")
        if self.graphs not in GRAPHS:
            raise ConfigError(f"unknown graphs {self.graphs!r}; known: {', '.join(GRAPHS)}.")
        for word in (piece.split(":")[0] for text in self.policies for piece in text.split(",")):
            if word not in POLICIES:
                raise ConfigError(f"unknown policy {word!r}; known: {', '.join(POLICIES)}.")
        if self.optimizer is not None and self.optimizer not in list(OptimizerNames):
            near = get_close_matches(self.optimizer, list(OptimizerNames), n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"Transformers has no optimizer {self.optimizer!r}.{hint}")
        if min(*self.batches, *self.seqs, self.rank, self.steps) < 1:
            raise ConfigError("batch, sequence, rank and steps are at least 1.")


def _build(model: str, method: Method, options: Options) -> Build:
    adapts = method.method != "full"
    return Build(
        impl=method.impl,
        variant=method.variant,
        model=model,
        checkpoint="",
        method=method.method,
        bits=method.bits,
        rank=options.rank if adapts else 0,
        longest=max(options.seqs),
        optimizer=(options.optimizer if adapts else None) or method.optimizer,
        masters=method.masters,
        device=options.device,
        dtype=options.dtype,
    )


def _points(model: str, method: Method, options: Options) -> Iterator[tuple[bool, Point]]:
    """Points of a method, and whether the model is built for recomputing (peers only)."""
    ours = method.impl == "qlora_kit"
    for batch in options.batches:
        for seq in options.seqs:
            point = Point(batch=batch, seq=seq, policy="", cap_gib=options.cap_gib, graph=False)
            small = options.device == "cuda" and batch * seq <= most_recorded(model)
            ways = {"off": (False,), "on": (small,), "both": (False, True)[: 1 + small]}
            if ours:
                for policy in options.policies:
                    for graph in ways[options.graphs]:
                        yield True, replace(point, policy=policy, graph=graph)
                continue
            for policy in OWN_POLICIES:
                recompute = policy == "recompute_all"
                word = "unsloth" if method.impl == "unsloth" and recompute else policy
                heads = HEADS if method.impl == "full" else HEADS[:1]
                for head in heads:
                    for graph in ways[options.graphs] if method.impl == "full" else (False,):
                        yield recompute, replace(point, policy=word, head=head, graph=graph)


def jobs_of(options: Options) -> list[Job]:
    """The jobs of a benchmark, model by model, in the order of its methods.

    Args:
        options: what a user chose.

    Returns:
        One job per process, its points in order of growing length.

    Example:
        >>> jobs = jobs_of(Options(models=("tiny",), methods=("full", "qlora"), fresh=False))
        >>> [(job.build.impl, len(job.points)) for job in jobs]
        [('full', 4), ('qlora_kit', 2)]
    """
    jobs: list[Job] = []
    for model in options.models:
        for name in options.methods:
            method = ALL[name]
            groups: dict[tuple[object, ...], tuple[Build, list[Point]]] = {}
            for recompute, point in _points(model, method, options):
                build = _build(model, method, options)
                apart: tuple[object, ...] = ()
                if name in PEERS:  # they are built for a policy, Unsloth for a shape as well
                    build = replace(build, checkpointing=recompute)
                    shape = (point.batch, point.seq) if method.impl == "unsloth" else ()
                    apart = (recompute, *shape)
                key = (point,) if options.fresh else apart
                groups.setdefault(key, (build, []))[1].append(point)
            jobs += [_job(build, points, options) for build, points in groups.values()]
    return jobs


def merged(rounds: Sequence[Options]) -> list[Job]:
    """The jobs of several sets of options, model by model; what needs the same model is one job.

    Args:
        rounds: in the order of their importance: where time runs out, the last ones are missing.

    Returns:
        Jobs; a point that two rounds share is measured once.

    Example:
        >>> first = Options(models=("tiny",), methods=("qlora",), fresh=False)
        >>> second = replace(first, methods=("lora", "qlora"), policies=("save", "offload"))
        >>> [(job.build.bits, len(job.points)) for job in merged([first, second])]
        [(4, 3), (16, 2)]
    """
    found: dict[object, Job] = {}
    for options in rounds:
        for job in jobs_of(options):
            key = (job.build, job.points) if options.fresh else job.build
            known = found.setdefault(key, replace(job, points=()))
            points = dict.fromkeys((*known.points, *job.points))
            ordered = sorted(points, key=lambda point: point.batch * point.seq)
            found[key] = replace(known, points=tuple(ordered))
    models = list(dict.fromkeys(job.build.model for job in found.values()))
    return sorted(found.values(), key=lambda job: models.index(job.build.model))


def without_known(jobs: Sequence[Job], earlier: Sequence[Row]) -> list[Job]:
    """What earlier rows have not measured.

    Args:
        jobs: of a benchmark.
        earlier: rows of records.

    Returns:
        Jobs with the points that are left; none without points.

    Example:
        >>> jobs = jobs_of(Options(models=("tiny",), methods=("qlora",), fresh=False))
        >>> row = first_fields(jobs[0].build, jobs[0].points[0]) | {"tokens_per_s": 1.0}
        >>> len(jobs[0].points), len(without_known(jobs, [row])[0].points)
        (2, 1)
    """
    known = {identity(row) for row in measured(earlier)}
    found = []
    for job in jobs:
        fields = (first_fields(job.build, point) for point in job.points)
        pairs = zip(fields, job.points, strict=True)
        points = tuple(point for row, point in pairs if identity(row) not in known)
        found += [replace(job, points=points)] if points else []
    return found


def _job(build: Build, points: Sequence[Point], options: Options) -> Job:
    ordered = sorted(points, key=lambda point: point.batch * point.seq)
    return Job(build=build, points=tuple(ordered), warmup=options.warmup, steps=options.steps)
