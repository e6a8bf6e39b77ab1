"""The grid of runs that predictions are held to: shapes, sizes, policies, optimizers, methods."""

from dataclasses import dataclass

from qlora_kit.bench.subject import Build, Job, Point

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


_ELEMENTWISE = "recompute_elementwise"

GRID: tuple[Case, ...] = (
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
            (1, 65536, "offload"),
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
)

SMALL: tuple[Case, ...] = (Case(model="tiny", rank=8, sizes=((2, 64, "save"),)),)
"""For machines without a GPU."""


def jobs(cases: tuple[Case, ...], *, device: str, warmup: int, steps: int) -> list[Job]:
    """Jobs that measure a grid.

    Args:
        cases: of the grid.
        device: `cuda` or `cpu`.
        warmup: steps before the timed ones.
        steps: timed steps.

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
        points = tuple(Point(batch=b, seq=s, policy=p) for b, s, p in ordered)
        found.append(Job(build=build, points=points, warmup=warmup, steps=steps))
    return found
