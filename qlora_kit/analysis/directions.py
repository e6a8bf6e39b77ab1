"""Directions of a low-rank change, without forming the change.

A module's change is ΔW = s·B·A with B (o, r) and A (r, i), so nothing here is ever larger
than the factors. With B = Q_b·R_b and Aᵀ = Q_a·R_a, the singular value decomposition of
the small s·R_b·R_aᵀ turns, by Q_b and Q_a, into that of ΔW.

Four sets of directions are named, each with orthonormal columns, strongest first:

- `A`: right singular vectors of A, in the space of inputs: the LoRA paper's choice;
- `B`: left singular vectors of B, in the space of outputs: the paper's other choice;
- `input`, `output`: right and left singular vectors of ΔW itself.

They answer different questions. A starts at random and a short training hardly turns it:
two adapters with the same seed agree in `A` before they have learned anything, two with
different seeds disagree although they learned the same. B starts at zero and holds
nothing but what was learned. `input` and `output` weigh each factor by the other.

AdaLoRA's λ is part of A; of DoRA, s·B·A alone is seen, without the lengths of rows. Files of PiSSA
hold the frozen start as more rows of A and columns of B: `input` and `output` see the change
alone, `A` and `B` the start too.

Source: arXiv:2106.09685, section 7.2 and appendix G.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qlora_kit.adapters.lora.low_rank import LowRank

Side = Literal["A", "B", "input", "output"]
SIDES: tuple[Side, ...] = get_args(Side)
"""Sets of directions that can be compared."""


@dataclass(frozen=True, slots=True)
class Directions:
    """The singular value decomposition of one module's ΔW.

    Example:
        >>> Directions(torch.eye(2), torch.tensor([3.0, 4.0]), torch.eye(2)).norm
        5.0
    """

    left: Tensor
    """U, (out, k) float64: directions of outputs."""
    values: Tensor
    """σ, (k,) float64, falling; k is the numerical rank, 0 for a change of nothing."""
    right: Tensor
    """V, (in, k) float64: directions of inputs."""

    @property
    def rank(self) -> int:
        """Singular values that are not rounding."""
        return self.values.numel()

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(self.values.norm())

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖²_F / σ₁²: how many directions carry the change; 0 for a change of nothing."""
        if not self.rank:
            return 0.0
        return float((self.values / self.values[0]).square().sum())


def decompose(pair: LowRank) -> Directions:
    """Decompose ΔW = s·B·A.

    Args:
        pair: of one module. Not modified.

    Returns:
        U, σ and V of ΔW; work and memory are of the size of A and B.

    Example:
        >>> pair = LowRank(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[3.0], [4.0]]), 0.5)
        >>> decompose(pair).values
        tensor([5.], dtype=torch.float64)
    """
    pair = pair.folded()
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, values, v = torch.linalg.svd(pair.scale * (r_b @ r_a.T), full_matrices=False)
    # Where parts of B·A cancel, as in an untrained PiSSA, what is left is rounding of them.
    whole = abs(pair.scale) * float(r_b.norm() * r_a.norm())
    kept = _numerical_rank(values, max(pair.a.shape[1], pair.b.shape[0]), whole)
    return Directions(q_b @ u[:, :kept], values[:kept], q_a @ v[:kept].T)


def subspace(pair: LowRank, side: Side) -> Tensor:
    """Directions of one module, strongest first.

    Args:
        pair: of one module.
        side: which ones; see the module's text.

    Returns:
        (d, k) float64 with orthonormal columns, d inputs or outputs; k ≤ r, without the
        directions of singular values that are rounding.

    Example:
        >>> pair = LowRank(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[3.0], [4.0]]), 0.5)
        >>> subspace(pair, "A").abs().T
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    if side in ("input", "output"):
        found = decompose(pair)
        return found.right if side == "input" else found.left
    pair = pair.folded()
    factor = pair.a.T if side == "A" else pair.b
    u, values, _ = torch.linalg.svd(factor.double(), full_matrices=False)
    return u[:, : _numerical_rank(values, max(factor.shape), float(values.sum()))]


def _numerical_rank(values: Tensor, size: int, whole: float) -> int:
    """Singular values above what rounding leaves of a zero, in a product of this size."""
    return int((values > whole * size * torch.finfo(torch.float64).eps).sum())


def layer_and_kind(module: str) -> tuple[int | None, str]:
    """Split a module's name into the number of its layer and what it is there.

    Args:
        module: dotted name.

    Returns:
        layer: the last number in the name, None without one.
        kind: what follows it, or the whole name.

    Example:
        >>> layer_and_kind("model.layers.12.self_attn.q_proj"), layer_and_kind("score")
        ((12, 'self_attn.q_proj'), (None, 'score'))
    """
    match = re.fullmatch(r"(?:.*\.)?(\d+)\.([^\d].*)", module)
    return (int(match[1]), match[2]) if match else (None, module)
