"""How much a change amplifies directions that its weight has, or has not: the paper's Table 7.

    factor = ‖ΔW‖_F / ‖Uᵀ W V‖_F,    U Σ Vᵀ = SVD(ΔW), r columns each

‖UᵀWV‖_F is what W itself holds in the directions of its change. It is read beside two
others: W's own strongest r directions, √(σ₁² + … + σ_r²), the most any r could hold, and
r random ones, ‖W‖_F·r/√(o·i) on average. A large factor with a projection above the
random one is the paper's finding: the change amplifies what W has, but does not stress.
A change whose last directions hold next to nothing has a small factor at r, since W holds
as much in those as in any; `factors` has it for the first 1, 2, …, r of them.

The weight comes from a checkpoint, one after the other, by the rows of an export
(`export/rows.py`): the 16-bit weights (`into="original"`), or the decoded NF4 weights that
the adapter was trained on (`into="quantized"`). Memory is bounded by one weight: its codes,
its smaller Gram matrix and, where it has fewer rows than columns, itself in float32. No
model is loaded.

Source: arXiv:2106.09685, section 7.3, table 7 and appendix H.4.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_kit.adapters.formats.peft import AdapterFiles
from qlora_kit.analysis.directions import Directions, decompose
from qlora_kit.analysis.similarity import random_directions
from qlora_kit.checkpoint.source import Source
from qlora_kit.core.errors import AdapterError, ConfigError, ShapeError
from qlora_kit.core.log import logger
from qlora_kit.core.patterns import matches_any
from qlora_kit.export.plan import make_plan
from qlora_kit.export.rows import InMemory, Rows, chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Amplification:
    """One module's line of the table.

    Example:
        >>> Amplification(module="h.0.q", shape=(4, 4), rank=1, delta_norms=(6.0,), weight_norm=8.0,
        ...     by_delta=(2.0,), by_weight=(4.0,), by_random=(1.0,)).factor
        3.0
    """

    module: str
    """Its dotted name."""
    shape: tuple[int, int]
    """(out, in)."""
    rank: int
    """r: singular values of ΔW that are not zero."""
    delta_norms: tuple[float, ...]
    """‖ΔW‖_F of its first 1, 2, …, r directions: √(σ₁² + … + σ_d²)."""
    weight_norm: float
    """‖W‖_F."""
    by_delta: tuple[float, ...]
    """‖UᵀWV‖_F for the first 1, 2, …, r directions of ΔW."""
    by_weight: tuple[float, ...]
    """The same for W's own directions."""
    by_random: tuple[float, ...]
    """The same for random ones, drawn once."""

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖_F."""
        return self.delta_norms[-1] if self.delta_norms else 0.0

    @property
    def factors(self) -> tuple[float | None, ...]:
        """‖ΔW‖_F / ‖UᵀWV‖_F of the first 1, 2, …, r directions; None where W has nothing there."""
        return tuple(
            norm / held if held else None
            for norm, held in zip(self.delta_norms, self.by_delta, strict=True)
        )

    @property
    def factor(self) -> float | None:
        """The last of `factors`, the paper's; None where ΔW is zero, or W has nothing there."""
        return self.factors[-1] if self.rank else None

    @property
    def expected_random(self) -> float:
        """Root mean square of ‖UᵀWV‖_F over all random directions: ‖W‖_F·r/√(o·i)."""
        return self.weight_norm * self.rank / (self.shape[0] * self.shape[1]) ** 0.5


def amplification(
    weight: Rows | Tensor,
    delta: Directions,
    *,
    module: str = "",
    transposed: bool = False,
    step: int = 1,
    seed: int = 0,
) -> Amplification:
    """Compare one weight with its change.

    Args:
        weight: W by rows, or in memory; (out, in), if `transposed` (in, out).
        delta: its change, decomposed.
        module: for the result.
        transposed: whether rows are inputs, as in GPT-2's Conv1D.
        step: chunks start at multiples of so many rows.
        seed: of the random directions.

    Returns:
        The line of the table.

    Raises:
        ShapeError: ΔW has another shape than W.

    Example:
        >>> u, v = torch.eye(2, dtype=torch.float64).split(1, dim=1)
        >>> delta = Directions(u, torch.tensor([6.0]), v)
        >>> found = amplification(torch.tensor([[5.0, 2.0], [1.0, 3.0]]), delta)
        >>> round(found.by_delta[0], 3), round(found.factor, 3)
        (2.0, 3.0)
    """
    rows = InMemory(weight) if isinstance(weight, Tensor) else weight
    shape = rows.shape[::-1] if transposed else rows.shape
    if shape != (delta.left.shape[0], delta.right.shape[0]):
        raise ShapeError(
            f"amplification needs W and ΔW of one shape: W is {shape} (out, in), ΔW "
            f"{(delta.left.shape[0], delta.right.shape[0])}."
        )
    generator = torch.Generator().manual_seed(seed)
    left, right = (random_directions(size, delta.rank, generator) for size in shape)
    pairs = [(delta.left, delta.right), (left, right)]
    if transposed:
        pairs = [(v, u) for u, v in pairs]
    gram, squares, projected = _one_pass(rows, pairs, step)
    own = torch.linalg.eigvalsh(gram).flip(0)[: delta.rank].clamp(min=0).double()
    return Amplification(
        module=module,
        shape=shape,
        rank=delta.rank,
        delta_norms=tuple(delta.values.square().cumsum(0).sqrt().tolist()),
        weight_norm=squares**0.5,
        by_delta=_corner_norms(projected[0]),
        by_weight=tuple(own.cumsum(0).sqrt().tolist()),
        by_random=_corner_norms(projected[1]),
    )


def _one_pass(
    rows: Rows, pairs: list[tuple[Tensor, Tensor]], step: int
) -> tuple[Tensor, float, list[Tensor]]:
    """Read a weight once: its smaller Gram matrix, ‖W‖²_F, and LᵀWR for each (L, R)."""
    count, columns = rows.shape
    wide = count < columns  # then its rows are collected, and WWᵀ made of them
    gram: Tensor | None = None
    whole = torch.empty(0)
    squares, start = 0.0, 0
    projected = [torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64) for a, b in pairs]
    for chunk in chunks(rows, step):
        stop = start + chunk.shape[0]
        squares += float(chunk.double().square().sum())
        for total, (a, b) in zip(projected, pairs, strict=True):
            product = chunk @ b.to(chunk.device, chunk.dtype)
            total += a[start:stop].T.double() @ product.double().cpu()
        if wide:
            whole = whole if start else chunk.new_empty(count, columns)
            whole[start:stop] = chunk
        else:
            part = chunk.T @ chunk
            gram = part if gram is None else gram.add_(part)
        start = stop
    if wide:
        gram = whole @ whole.T
    assert gram is not None
    return gram, squares, projected


def _corner_norms(projected: Tensor) -> tuple[float, ...]:
    """Frobenius norms of the top left 1 x 1, 2 x 2, ... corners."""
    return tuple(projected.square().cumsum(0).cumsum(1).diagonal().sqrt().tolist())


def amplification_table(
    source: Source,
    files: AdapterFiles,
    *,
    into: str = "quantized",
    modules: tuple[str, ...] = (),
    device: torch.device | None = None,
    seed: int = 0,
) -> Iterator[Amplification]:
    """Compare every changed weight of a checkpoint with its change.

    Args:
        source: the base, from `qlora_kit.checkpoint.source.open_source`.
        files: the adapter.
        into: `quantized`: W as training decoded it. `original`: the 16-bit weights.
        modules: patterns of names; empty for all.
        device: where to compute; None for the CPU.
        seed: of the random directions, which differ from weight to weight.

    Yields:
        One line per module, in the order of the checkpoint.

    Raises:
        ConfigError: `into` has another value.
        AdapterError: the adapter does not fit the base, or no module matches.
        FormatError: `into="original"` of a 4-bit base.

    Example:
        >>> next(amplification_table(None, None, into="both"))
        Traceback (most recent call last):
        qlora_kit.core.errors.ConfigError: into must be quantized or original, got 'both'.
    """
    if into not in ("quantized", "original"):
        raise ConfigError(f"into must be quantized or original, got {into!r}.")
    chosen = {n: p for n, p in files.deltas.items() if not modules or matches_any(n, modules)}
    if not chosen:
        raise AdapterError(f"the adapter changes no module that matches {', '.join(modules)}.")
    place = device or torch.device("cpu")
    plan = make_plan(source, replace(files, deltas=chosen), into=into, device=place)
    for note in plan.notes:
        logger.info("%s", note)
    for number, item in enumerate(plan.items):
        if item.pair is not None:
            yield amplification(
                item.open_rows(),
                decompose(item.pair),
                module=(item.param or item.name).removesuffix(".weight"),
                transposed=item.transposed,
                step=item.step,
                seed=seed + number,
            )
