"""LoRA on one linear layer: y = base(x) + s·(x Aᵀ) Bᵀ, and its frozen-A variant.

Shapes: x (..., K), A (r, K), B (N, r), y (..., N); A starts random, B at zero, so that
the adapted model starts as the base. Gradients, with g = dL/dy and X, g flattened to
rows: dB = s gᵀ(X Aᵀ), dA = s (g B)ᵀX, and dX = g Ŵ + s (g B) A. rsLoRA only changes s
(alpha/√r); LoRA-FA only freezes A, after which nothing needs X: X Aᵀ (rows, r) is all
that is kept for the backward.

Three paths, by base:

- `NF4Linear` without dropout: one call, `base(x, A, B, s)`; the op saves x (or X Aᵀ)
  once and folds the low-rank product into its pass.
- `NF4Linear` with dropout, which gives A another input than the base has: the base
  alone, then the low-rank product in plain torch.
- A dense base (`nn.Linear`, GPT-2's `Conv1D`): plain torch as well. A frozen dense
  weight makes autograd keep no x for it, so x is kept by A alone, or by nobody.

A and B are masters in the configured dtype (float32 by default) and are cast to the
dtype of x for the product; their gradients arrive in the master dtype.

A's random start comes from a generator seeded with the run's seed and the module's
name: it does not depend on the order of modules, on which others are adapted, on the
device or on the global random state.

Defaults: rank 16, alpha 32, no dropout, A uniform (`init: kaiming`), all linears of the blocks,
float32 masters. QLoRA's paper (arXiv:2305.14314) has rank 64, alpha 16, dropout 0.1 or 0.05.

Source: arXiv:2106.09685 (LoRA), arXiv:2312.03732 (rsLoRA), arXiv:2308.03303 (LoRA-FA).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.adapters.linears import linear_shape, seeded
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.protocol import LinearWrapper
from qlora_kit.nn.linear import NF4Linear


def initial_a(config: LoRA, name: str, rank: int, in_features: int, seed: int) -> Tensor:
    """Draw the random start of one A.

    `kaiming` is uniform in ±1/√K, what kaiming_uniform with a = √5 gives; `gaussian` has
    the standard deviation 1/r.

    Args:
        config: decides the distribution.
        name: the module's dotted name.
        rank: r.
        in_features: K.
        seed: the run's.

    Returns:
        (r, K) float32 on the CPU; the same for the same arguments, on every machine.

    Example:
        >>> first = initial_a(LoRA(), "layers.0.q_proj", 4, 64, seed=0)
        >>> torch.equal(first, initial_a(LoRA(), "layers.0.q_proj", 4, 64, seed=0))
        True
        >>> bool(first.abs().max() <= 1 / 64**0.5)
        True
    """
    generator = seeded(name, seed)
    a = torch.empty(rank, in_features)
    if config.init == "gaussian":
        return a.normal_(0.0, 1.0 / rank, generator=generator)
    bound = 1.0 / math.sqrt(in_features)
    return a.uniform_(-bound, bound, generator=generator)


class LowRankLinear(LinearWrapper):
    """A linear with a pair A, B beside it: what LoRA and its variants share, but the forward.

    Attributes:
        base: the frozen linear.
        lora_A: (r, K) in the master dtype; does not require a gradient in LoRA-FA.
        lora_B: (N, r) in the master dtype; zero at the start.
        scale: s.
    """

    def __init__(
        self,
        base: nn.Module,
        place: str,
        config: LoRA,
        *,
        seed: int,
        rank: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Wrap one linear; freezing it is left to `attach`, which can also undo it.

        Args:
            base: one of `LINEARS`. Not modified.
            place: its dotted name in the model.
            config: rank, scale, dropout, start and dtype, by the patterns that match `place`.
            seed: the run's.
            rank: instead of the configuration's, for an adapter read from a file.
            scale: likewise.

        Raises:
            AdapterError: base is not a linear we know.
        """
        super().__init__(base, place)
        out_features, in_features = linear_shape(base)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = config.rank_of(place) if rank is None else rank
        self.scale = config.scale_of(place) if scale is None else scale
        self.dropout = config.dropout
        device = next(base.parameters()).device
        dtype = getattr(torch, config.dtype)
        if device.type == "meta":
            a = torch.empty(self.rank, in_features, dtype=dtype, device=device)
        else:
            a = initial_a(config, place, self.rank, in_features, seed).to(device, dtype)
        self.lora_A = nn.Parameter(a, requires_grad=not config.freeze_a)
        self.lora_B = nn.Parameter(torch.zeros(out_features, self.rank, dtype=dtype, device=device))

    def with_pair(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Apply the base and s·(x aᵀ) bᵀ, with dropout on the input of `a`.

        One call where the base is NF4 and nothing is dropped, else plain torch.

        Args:
            x: (..., K).
            a: (r, K).
            b: (N, r).

        Returns:
            (..., N) in the dtype the base answers with.
        """
        dropping = self.training and self.dropout > 0.0
        if isinstance(self.base, NF4Linear) and not dropping:
            return self.base(x, a, b, self.scale)
        y = self.base(x)
        branch = F.dropout(x, self.dropout) if dropping else x
        return self.add_product(y, F.linear(branch, a.to(x.dtype)), b)

    def add_product(self, y: Tensor, z: Tensor, b: Tensor) -> Tensor:
        """Compute y + s·z bᵀ with one rounding.

        Args:
            y: (..., N). Not modified.
            z: (..., r).
            b: (N, r), brought to the dtype of z.

        Returns:
            (..., N).
        """
        rows, flat = z.reshape(-1, b.shape[1]), y.reshape(-1, self.out_features)
        return torch.addmm(flat, rows, b.to(z.dtype).T, alpha=self.scale).view(y.shape)

    def trainable(self) -> dict[str, nn.Parameter]:
        """A and B, or B alone when A is frozen."""
        both = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        return {key: p for key, p in both.items() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """A and B; a frozen A as well, since a merge and another machine need it."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def low_rank(self) -> LowRank:
        """Describe the piece as files hold it; tensors are shared where they can be."""
        return LowRank.of(self.state(), self.scale)

    def own_state(self, pair: LowRank) -> dict[str, Tensor]:
        """Give the values that `low_rank` described their own names, as `state` has them."""
        return pair.named()

    def merge_delta(self) -> Tensor:
        """Compute s·B·A.

        Returns:
            (N, K) float32, on the device of A.
        """
        a, b = self.lora_A.detach().float(), self.lora_B.detach().float()
        return torch.mm(b, a).mul_(self.scale)

    def extra_repr(self) -> str:
        """Show what distinguishes this branch."""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


@dataclass(frozen=True, slots=True)
class Term:
    """One low-rank term of a piece, s·diag(`row_factors`)·A and B; or parts of its masters."""

    a: Tensor
    """A, (r, K) in the master dtype."""
    b: Tensor
    """B, (n, r) likewise."""
    scale: float
    """s."""
    row_factors: Tensor | None = None
    """What rows of A are multiplied with besides s, (r, 1) in the master dtype."""
    rows_of_a: slice | None = None
    """The rows of `a` that are meant; None: all."""
    rows_of_b: slice | None = None
    """Likewise of `b`."""
    outputs: slice | None = None
    """The linear's outputs that it is added to; None: all."""

    @property
    def rank(self) -> int:
        """Rows of A that are meant."""
        rows = self.rows_of_a
        return self.a.shape[0] if rows is None else rows.stop - rows.start


class FusibleLinear(LowRankLinear):
    """Low-rank terms that a layer which runs as one step (`block/`) can take over.

    Such a layer multiplies by A' and B' in one pass, y = f ⊙ (x Ŵᵀ + (x A'ᵀ) B'ᵀ) + bias, and asks
    the piece what A', B' and f are made of, and what their gradients mean: A' = s·A, B' = B and
    f = 1 but for subclasses that say otherwise.
    """

    @property
    def terms(self) -> list[Term]:
        """What A' is made of, one below the other, and B', side by side."""
        return [Term(self.lora_A, self.lora_B, self.scale, self.row_factors)]

    @property
    def columns(self) -> int:
        """Rows of A' and columns of B': the ranks of all `terms`."""
        return self.rank

    @property
    def lengths(self) -> tuple[Tensor, Tensor] | None:
        """Row lengths m and ‖Ŵ‖², (N,), where rows have factors f = m/‖Ŵ + B A'‖; else None."""
        return None

    @property
    def needs_output(self) -> bool:
        """Whether m is trained: its gradient takes the layer's output."""
        return False

    @property
    def masters(self) -> list[nn.Parameter]:
        """What is or could be trained, in the order of `pull_back`."""
        return [self.lora_A, self.lora_B]

    @property
    def row_factors(self) -> Tensor | None:
        """What rows of A are multiplied with besides s, (r, 1) in the master dtype."""
        return None

    @property
    def needs_gradient_of_a(self) -> bool:
        """Whether something that A' is made of is trained."""
        return self.lora_A.requires_grad

    @property
    def needs_gradient_of_b(self) -> bool:
        """Whether B is trained."""
        return self.lora_B.requires_grad

    def pull_back(
        self, d_a: Tensor | None, d_b: Tensor | None, d_lengths: Tensor | None = None
    ) -> list[Tensor | None]:
        """Turn gradients of A' and B' into those of the masters.

        Args:
            d_a: (columns, K) float32, or None where it is not needed.
            d_b: (N, columns) float32, likewise.
            d_lengths: (N,) float32, that of m, where `needs_output`.

        Returns:
            As `masters`, in their dtypes; None for what is frozen.
        """
        of_a = None if d_a is None else (d_a * self.scale).to(self.lora_A.dtype)
        return [of_a, None if d_b is None else d_b.to(self.lora_B.dtype)]


class LoRALinear(FusibleLinear):
    """A linear with a low-rank branch added; takes the linear's place in the model.

    Example:
        >>> linear = nn.Linear(8, 4)
        >>> adapted = LoRALinear(linear, "proj", LoRA(rank=2), seed=0)
        >>> x = torch.ones(3, 8)
        >>> torch.equal(adapted(x), linear(x))  # B is zero
        True
        >>> adapted.lora_A.shape, adapted.lora_B.shape, adapted.scale
        (torch.Size([2, 8]), torch.Size([4, 2]), 16.0)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and, unless switched off, the low-rank branch.

        Args:
            x: (..., K).

        Returns:
            (..., N) in the dtype the base answers with.
        """
        return self.with_pair(x, self.lora_A, self.lora_B) if self.enabled else self.base(x)
