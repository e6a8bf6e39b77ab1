"""How alike two adapters' subspaces are: φ(i, j) for all i and j, and what chance gives.

    φ(i, j) = ‖V₁ⁱᵀ V₂ʲ‖²_F / min(i, j)

V₁ⁱ holds the first i directions of one adapter and V₂ʲ the first j of the other, both
orthonormal. φ is 1 where one span contains the other, 0 where they are orthogonal, and
max(i, j)/d on average for random spans in d dimensions: a picture of φ without that
control beside it shows nothing, since r 64 in 576 dimensions gives 0.11 by chance.

All of φ comes from one product: the squares of V₁ᵀV₂, summed from the corner.

Source: arXiv:2106.09685, section 7.2, equation 4 and appendix G.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.adapters.formats.peft import AdapterFiles
from qlora_kit.analysis.directions import Side, layer_and_kind, subspace
from qlora_kit.core.errors import AdapterError, ShapeError
from qlora_kit.core.patterns import matches_any


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """φ of one module between two adapters.

    Example:
        >>> Similarity(module="model.layers.3.mlp.up_proj", side="A", dimension=8,
        ...     grid=torch.ones(2, 4), random=torch.ones(2, 4)).expected(1, 4)
        0.5
    """

    module: str
    """Its dotted name."""
    side: Side
    """Which directions were compared."""
    dimension: int
    """d, of the space they lie in."""
    grid: Tensor
    """φ(i, j) at [i - 1, j - 1], (r₁, r₂) float64; empty where a change is zero."""
    random: Tensor
    """The same of random directions of the same number."""

    def expected(self, i: int, j: int) -> float:
        """What random directions give on average: max(i, j)/d."""
        return max(i, j) / self.dimension


def similarity_grid(first: Tensor, second: Tensor) -> Tensor:
    """Compute φ(i, j) for all i and j.

    Args:
        first: (d, r₁), orthonormal columns.
        second: (d, r₂), orthonormal columns.

    Returns:
        (r₁, r₂), φ(i, j) at [i - 1, j - 1], between 0 and 1.

    Raises:
        ShapeError: the columns lie in different spaces, or are not orthonormal.

    Example:
        >>> axes = torch.eye(3, dtype=torch.float64)
        >>> similarity_grid(axes[:, :2], axes[:, 1:])
        tensor([[0.0000, 0.0000],
                [1.0000, 0.5000]], dtype=torch.float64)
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[0]:
        raise ShapeError(
            "similarity_grid needs two (d, r) matrices of one d, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}. Compare the same module and side."
        )
    for columns in (first, second):
        _refuse_skewed(columns)
    i = torch.arange(1, first.shape[1] + 1, device=first.device)
    j = torch.arange(1, second.shape[1] + 1, device=first.device)
    overlap = (first.T @ second).square().cumsum(0).cumsum(1)
    return overlap / torch.minimum(i[:, None], j[None, :])


def _refuse_skewed(columns: Tensor) -> None:
    """Columns that are not orthonormal make φ a number without meaning."""
    count = columns.shape[1]
    unit = torch.eye(count, dtype=columns.dtype, device=columns.device)
    worst = float((columns.T @ columns - unit).abs().max()) if count else 0.0
    bound = 64 * columns.shape[0] * torch.finfo(columns.dtype).eps
    if worst > bound:
        raise ShapeError(
            f"similarity_grid needs orthonormal columns; these differ by {worst:.1e} from that. "
            "Take them from a singular value decomposition, or torch.linalg.qr."
        )


def random_directions(dimension: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw orthonormal directions, every span as likely as every other.

    Args:
        dimension: d.
        count: at most d.
        generator: on the CPU.

    Returns:
        (d, count) float64.

    Example:
        >>> found = random_directions(5, 2, torch.Generator().manual_seed(0))
        >>> torch.allclose(found.T @ found, torch.eye(2, dtype=torch.float64))
        True
    """
    drawn = torch.randn(dimension, count, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(drawn)[0]


def compare_adapters(
    first: AdapterFiles,
    second: AdapterFiles,
    *,
    sides: tuple[Side, ...] = ("A", "B"),
    modules: tuple[str, ...] = (),
    seed: int = 0,
) -> list[Similarity]:
    """Compare two adapters of one base, module by module.

    Args:
        first: gives i.
        second: gives j. Ranks may differ.
        sides: which directions.
        modules: patterns of names; empty for all that both have.
        seed: of the random control.

    Returns:
        One per side and module, in the first adapter's order.

    Raises:
        AdapterError: no module is common, or a common one has other sizes in each.

    Example:
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> from qlora_kit.adapters.lora.low_rank import LowRank
        >>> pair = LowRank(torch.eye(2, 8), torch.eye(4, 2), 1.0)
        >>> files = AdapterFiles(config=LoRA(rank=2), deltas={"h.0.q": pair})
        >>> compare_adapters(files, files)[0].grid[1, 1].item()
        1.0
    """
    common = [
        name
        for name in first.deltas
        if name in second.deltas and (not modules or matches_any(name, modules))
    ]
    if not common:
        raise AdapterError(
            "the adapters have no module in common that was asked for. The first has "
            f"{_kinds(first)}, the second {_kinds(second)}."
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for side in sides:
        for name in common:
            ours, theirs = subspace(first.deltas[name], side), subspace(second.deltas[name], side)
            if ours.shape[0] != theirs.shape[0]:
                raise AdapterError(
                    f"{name} has {ours.shape[0]} {_SPACE[side]} in one adapter and "
                    f"{theirs.shape[0]} in the other: they belong to different bases."
                )
            chance = (random_directions(t.shape[0], t.shape[1], generator) for t in (ours, theirs))
            found.append(
                Similarity(
                    module=name,
                    side=side,
                    dimension=ours.shape[0],
                    grid=similarity_grid(ours, theirs),
                    random=similarity_grid(*chance),
                )
            )
    return found


_SPACE = {"A": "inputs", "input": "inputs", "B": "outputs", "output": "outputs"}


def _kinds(files: AdapterFiles) -> str:
    return ", ".join(sorted({layer_and_kind(name)[1] for name in files.deltas})) or "none"


def mean_grids(found: list[Similarity]) -> dict[tuple[Side, str], tuple[Tensor, Tensor, int]]:
    """Average φ over the layers of a model.

    Args:
        found: of `compare_adapters`.

    Returns:
        (side, kind of module) to φ, its random control, both float64, and the number of
        layers averaged. Modules whose ranks or sizes differ from the first of their kind,
        or whose change is zero, are left out.

    Example:
        >>> half = torch.full((1, 1), 0.5)
        >>> one = {"side": "A", "dimension": 8, "random": half}
        >>> layers = [Similarity(module=f"h.{i}.q", grid=half * i, **one) for i in (0, 2)]
        >>> mean_grids(layers)["A", "q"][0].item()
        0.5
    """
    groups: dict[tuple[Side, str], list[Similarity]] = {}
    for one in found:
        group = groups.setdefault((one.side, layer_and_kind(one.module)[1]), [])
        if one.grid.numel() and (not group or group[0].grid.shape == one.grid.shape):
            group.append(one)
    return {
        key: (
            torch.stack([one.grid for one in group]).mean(0),
            torch.stack([one.random for one in group]).mean(0),
            len(group),
        )
        for key, group in groups.items()
        if group
    }
