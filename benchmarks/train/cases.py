"""The cases of the table: shapes, what each library runs, and what ours has to reach.

A case becomes points, and points that need the same model are measured by one process
(`plan`): loading once saves minutes. A point that two cases share is measured once. Every
case runs under 44 GiB, what a 48 GB card with error correction has for torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from qlora_kit.bench.shapes import MODELS
from qlora_kit.bench.subject import Build, Job, Point
from qlora_kit.block.policy import POLICIES
from qlora_kit.block.tiles import Tile

CAP_GIB = 44.0
LONG = 16_384
"""Tokens of a step above which it takes seconds."""
IMPLS = ("qlora_kit", "peft", "peft_liger", "unsloth")
UNSLOTH_VARIANTS = ("compile", "eager")
MIXED = "offload_attention:30,recompute_elementwise:2"
"""Layers by policy, of 32. Those that keep more come last, for what they keep is gone before the
others' working set is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What ours has to reach in a case; None: no bound."""

    tokens_per_s: float | None = None
    over_unsloth: float | None = None
    """Times the fastest Unsloth row of the case."""
    peak_gib: float | None = None
    """Allocated, and reserved where the step runs as a CUDA graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What a peer runs in a case."""

    impl: str
    policy: str
    """`recompute_all` or `save`; Unsloth's own checkpointing is `unsloth`."""
    switches: tuple[str, ...] = ()
    """Variant switches besides those of every run."""


@dataclass(frozen=True, slots=True)
class Ours:
    """What ours runs in a case."""

    policy: str
    tile: Tile = field(default="auto", kw_only=True)
    """Tokens at a time where each is alone."""
    keep_decoded: int = field(default=0, kw_only=True)
    """Layers whose weights stay decoded."""
    embeddings_on_host: bool = field(default=False, kw_only=True)
    deterministic: bool = field(default=False, kw_only=True)
    """The same bits in every run."""
    profile: bool = field(default=False, kw_only=True)
    """Say where its time goes, always."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the targets."""

    name: str
    model: str = "Llama-3.1-8B"
    batch: int = 4
    seq: int = 2048
    rank: int = 16
    warmup: int | None = None
    steps: int | None = None
    """Fewer than usual where a step takes seconds."""
    methods: tuple[str, ...] = ("lora",)
    ours: tuple[Ours, ...]
    """The best of them counts."""
    peers: tuple[Peer, ...] = ()
    target: Target = field(default_factory=Target)


_CHECKPOINTING = (
    Peer(impl="unsloth", policy="unsloth"),
    Peer(impl="peft_liger", policy="recompute_all"),
    Peer(impl="peft", policy="recompute_all"),
)
_SAVING = (Peer(impl="unsloth", policy="save"), Peer(impl="peft_liger", policy="save"))

CASES: tuple[Case, ...] = (
    Case(
        name="full",
        ours=(
            Ours("recompute_all"),
            Ours("offload_attention"),
            Ours(MIXED),
            # One layer more fits into 9 GiB where A and B are rounded a layer at a time, as with
            # tiles, were it a single one; two, where the embeddings are on the host.
            Ours("offload_attention:29,recompute_elementwise:3", tile=4 * 2048),
            Ours("offload_attention:28,recompute_elementwise:4", embeddings_on_host=True),
        ),
        peers=_CHECKPOINTING,
        target=Target(tokens_per_s=13_600, over_unsloth=1.28, peak_gib=9.0),
    ),
    Case(
        name="lean",
        ours=(
            Ours("offload", tile=4096, embeddings_on_host=True),
            Ours("offload_attention", tile=4096, embeddings_on_host=True, profile=True),
        ),
        peers=_CHECKPOINTING[:1],
        target=Target(tokens_per_s=10_600, over_unsloth=1.0, peak_gib=6.5),
    ),
    Case(
        name="best",
        ours=(
            Ours("recompute_elementwise", profile=True),
            Ours("recompute_elementwise", keep_decoded=26),
            Ours("recompute_elementwise", keep_decoded=32),
            Ours("save"),
        ),
        peers=_SAVING,
        target=Target(tokens_per_s=18_000, over_unsloth=1.2, peak_gib=CAP_GIB),
    ),
    Case(
        name="small",
        batch=1,
        ours=(
            Ours("save"),
            Ours("recompute_elementwise", keep_decoded=8),
            Ours("recompute_elementwise", keep_decoded=9),
            Ours("recompute_elementwise", keep_decoded=10, embeddings_on_host=True),
        ),
        peers=_SAVING + _CHECKPOINTING,
        target=Target(tokens_per_s=16_000, over_unsloth=3.0, peak_gib=16.0),
    ),
    Case(
        name="repeatable",
        ours=(Ours("recompute_elementwise", deterministic=True),),
    ),
    Case(
        name="long",
        batch=1,
        seq=32768,
        warmup=1,
        steps=3,
        ours=(
            Ours("offload_attention"),
            Ours("offload_attention:31,recompute_elementwise:1", tile=None),
        ),
        peers=(
            Peer(impl="unsloth", policy="unsloth"),
            Peer(impl="unsloth", policy="unsloth", switches=("tiled",)),
        ),
        target=Target(over_unsloth=1.25, peak_gib=14.0),
    ),
    Case(
        name="70b",
        model="Llama-3.3-70B",
        batch=1,
        seq=4096,
        rank=32,
        ours=(
            Ours("offload_attention", embeddings_on_host=True),
            Ours("offload", embeddings_on_host=True),
        ),
        peers=(Peer(impl="unsloth", policy="unsloth"),),
        target=Target(over_unsloth=1.15, tokens_per_s=1.15 * 1236, peak_gib=CAP_GIB),
    ),
    Case(
        name="lora_fa",
        methods=("lora", "lora_fa"),
        ours=tuple(Ours(policy) for policy in POLICIES),
    ),
)
"""In the order they are run, unless another one is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line chose."""

    impls: tuple[str, ...] = IMPLS
    model: str | None = None
    """Instead of the case's."""
    batch: int | None = None
    seq: int | None = None
    policies: tuple[str, ...] = ()
    """Ours, instead of the case's."""
    ours_rows: tuple[str, ...] = ()
    """`case/number` of the case's rows that are wanted, from 1 on; cases without a word: all."""
    unsloth_variants: tuple[str, ...] = UNSLOTH_VARIANTS
    unsloth_rows: tuple[str, ...] = ()
    """`variant/policy` of its rows that are wanted, in every case or as `case/variant/policy` in
    one; empty: all."""
    cap_gib: float | None = CAP_GIB
    optimizer: str = "adamw_8bit"
    step: str = "auto"
    device: str = "cuda"
    dtype: str = "bfloat16"
    warmup: int = 3
    steps: int = 6
    profile: tuple[str, ...] = ()
    trainer: bool = False
    fresh: bool = False
    """A process for every point, not for every model."""


def scaled(policy: str, layers: int) -> str:
    """A mixture of policies for a model with another number of layers.

    Args:
        policy: one name, or `name:count` joined by commas.
        layers: of the model.

    Returns:
        The same shares, as far as whole layers allow.

    Example:
        >>> scaled("save:8,recompute_all:24", 2), scaled("save", 2)
        ('save:1,recompute_all:1', 'save')
    """
    parts = [part.split(":") for part in policy.split(",")]
    if len(parts) == 1:
        return policy
    counts = [int(count) for _, count in parts]
    if sum(counts) == layers:
        return policy
    made: list[int] = []
    for later, count in zip(reversed(range(len(counts))), counts, strict=True):
        left = layers - sum(made) - later  # every kind has a layer
        made.append(min(left, max(1, round(layers * count / sum(counts)))) if later else left)
    return ",".join(f"{name}:{count}" for (name, _), count in zip(parts, made, strict=True))


def _wanted(case: Case, rows: Sequence[str]) -> Sequence[Ours]:
    """What ours runs in a case, of which `case/number` may name a part."""
    numbers = [
        int(number) for name, _, number in (row.partition("/") for row in rows) if name == case.name
    ]
    return [case.ours[number - 1] for number in numbers] or case.ours


def _builds(case: Case, options: Options) -> Iterable[tuple[Build, Point]]:
    """Every measurement of a case with the model it needs; checkpoints are filled in later."""
    build = Build(
        impl="",
        model=options.model or case.model,
        checkpoint="",
        rank=case.rank,
        optimizer=options.optimizer,
        step=options.step,
        device=options.device,
        dtype=options.dtype,
    )
    point = Point(
        batch=options.batch or case.batch,
        seq=options.seq or case.seq,
        policy="",
        cap_gib=options.cap_gib,
        warmup=case.warmup,
        steps=case.steps,
        cases=(case.name,),
    )
    layers = MODELS[build.model].num_hidden_layers
    for method in case.methods:
        for one in [Ours(policy) for policy in options.policies] or _wanted(
            case, options.ours_rows
        ):
            yield (
                replace(
                    build,
                    impl="qlora_kit",
                    method=method,
                    embeddings_on_host=one.embeddings_on_host,
                    deterministic=one.deterministic,
                ),
                replace(
                    point,
                    policy=scaled(one.policy, layers),
                    tile=one.tile,
                    keep_decoded=min(one.keep_decoded, layers),
                    profile=one.profile,
                ),
            )
    for peer in case.peers:
        variants = options.unsloth_variants if peer.impl == "unsloth" else ("",)
        for variant in variants:
            switches = "+".join(filter(None, (variant, *peer.switches)))
            name, wanted = f"{switches}/{peer.policy}", options.unsloth_rows
            asked = not wanted or name in wanted or f"{case.name}/{name}" in wanted
            if peer.impl == "unsloth" and not asked:
                continue
            yield (
                replace(
                    build,
                    impl=peer.impl,
                    variant=switches,
                    checkpointing=peer.policy != "save",
                ),
                replace(point, policy=peer.policy),
            )


def _apart(build: Build, point: Point, *, fresh: bool) -> tuple[object, ...]:
    """Points that differ in this are measured by different processes.

    What torch.compile makes for a second shape is slower than for the first one: Unsloth,
    which compiles layers, gets a process for each shape. Long rows of ours come by themselves, so
    that they are measured when all shorter ones have been.
    """
    if fresh:
        return (replace(point, cases=(), profile=False),)
    if build.impl == "unsloth":
        return (point.batch, point.seq)
    return (point.batch * point.seq > LONG,)


def plan(cases: Sequence[Case], options: Options) -> list[Job]:
    """Jobs that measure every point of the cases once, by model, ours first.

    Args:
        cases: of `CASES`.
        options: what the command line chose.

    Returns:
        One job per process. Points are in order of growing length, so that what one left
        in a cache is never in the way of a smaller one.
    """
    groups: dict[tuple[Build, tuple[object, ...]], dict[Point, tuple[tuple[str, ...], bool]]] = {}
    for case in cases:
        for build, point in _builds(case, options):
            if build.impl not in options.impls:
                continue
            points = groups.setdefault((build, _apart(build, point, fresh=options.fresh)), {})
            key = replace(point, cases=(), profile=False)
            names, profiled = points.get(key, ((), False))
            points[key] = (*names, *point.cases), profiled or point.profile
    jobs = []
    for (build, _), points in groups.items():
        ordered = sorted(points.items(), key=lambda item: item[0].batch * item[0].seq)
        made = tuple(
            replace(point, cases=names, profile=profiled) for point, (names, profiled) in ordered
        )
        jobs.append(
            Job(
                build=replace(build, longest=max(point.seq for point in made)),
                points=made,
                warmup=options.warmup,
                steps=options.steps,
                profile=build.impl in options.profile,
                trainer=options.trainer and build.impl == "qlora_kit",
            )
        )
    models = list(dict.fromkeys(job.build.model for job in jobs))
    return sorted(
        jobs, key=lambda job: (models.index(job.build.model), IMPLS.index(job.build.impl))
    )
