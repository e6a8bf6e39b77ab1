"""PiSSA (`init: pissa`): the leading singular directions are trained, on a base that stays.

They take the place of a random A and a B of zero: Ŵ ≈ U Σ Vᵀ, A₀ = √(Σ/s) Vᵀ, B₀ = U √(Σ/s), of
rank r. The paper puts the rest, Ŵ - s·B₀A₀, in the base's place. On a base of 4 bits that
rest would have to be quantized again, with a new error of a tenth of its size, and the
original weight that could pay for it is not at hand: so the base is left as it is, and the
start is subtracted where it is added,

    y = x Ŵᵀ + s (x Aᵀ) Bᵀ - s (x A₀ᵀ) B₀ᵀ

which is the same function, has the same gradients, starts as exactly the base on 4 and on
16 bits, and costs a second, frozen, branch of rank r, in the same products: fused layers run
it as a LoRA of rank 2r. Merging adds s (B A - B₀ A₀). A file holds the change as one LoRA of
rank 2r, [A; A₀] and [B, -B₀] with the same s: PEFT and all others read it as that, on an
ordinary base, and `qlora_kit.json` records that the second half is the frozen start, so that
training goes on here as it was. PEFT's own PiSSA files name a base that was changed: they are
refused; let PEFT convert them to LoRA (`path_initial_model_for_weight_conversion`) and they
are read.

Only plain LoRA and rsLoRA start so. The leading directions come from an exact decomposition of
small matrices and from 8 rounds of subspace iteration of larger ones, seeded like all
random starts; one linear's float32 weight is in memory at a time.

Defaults: LoRA's, rank 16 and alpha 32; LoRA starts so only where `init` says it.

Source: arXiv:2404.02948 (PiSSA), subspace iteration: arXiv:0909.4061.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.adapters.linears import seeded
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.dora import dense_weight
from qlora_kit.adapters.lora.layer import FusibleLinear, LowRankLinear, Term
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.core.errors import AdapterError

EXACT = 512
"""Matrices whose smaller side is no larger are decomposed exactly."""
_SPARE, _ROUNDS = 16, 8


def leading_factors(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factor the best approximation of a rank: √Σ goes to either side.

    Args:
        matrix: (N, K) float32.
        rank: r.
        generator: on the CPU, for large matrices.

    Returns:
        left: (N, r) U·√Σ.
        right: (r, K) √Σ·Vᵀ.

    Raises:
        AdapterError: the matrix has no such rank.

    Example:
        >>> left, right = leading_factors(torch.diag(torch.tensor([4.0, 1.0])), 1, seeded("a", 0))
        >>> (left @ right).round().tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """
    smaller = min(matrix.shape)
    if rank > smaller:
        raise AdapterError(
            f"a weight of shape {tuple(matrix.shape)} has {smaller} singular directions, fewer "
            f"than the rank {rank}. Lower the rank, or use init kaiming for this module."
        )
    if smaller <= EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        width = min(smaller, rank + _SPARE)
        start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
        basis = torch.linalg.qr(matrix @ start)[0]
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(matrix.T @ basis)[0]
            basis = torch.linalg.qr(matrix @ basis)[0]
        small, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ small
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


class PiSSALinear(FusibleLinear):
    """A linear whose leading singular directions are trained; see the module's text.

    Attributes:
        start_a: A₀, (r, K) in the master dtype, frozen.
        start_b: B₀, (N, r) in the master dtype, frozen.

    Example:
        >>> linear = nn.Linear(8, 4)
        >>> adapted = PiSSALinear(linear, "proj", LoRA(rank=2, init="pissa"), seed=0)
        >>> x = torch.ones(3, 8)
        >>> torch.allclose(adapted(x), linear(x), atol=1e-6), sorted(adapted.trainable())
        (True, ['lora_A', 'lora_B'])
    """

    start_a: Tensor
    start_b: Tensor

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
        """Wrap one linear and decompose its weight.

        Args:
            base: one of `linears.LINEARS`. Not modified; decoded for a moment.
            place: its dotted name in the model.
            config: rank, scale, dropout and dtype, by the patterns that match `place`.
            seed: the run's.
            rank: instead of the configuration's, for an adapter read from a file, whose values
                follow: nothing is decomposed.
            scale: likewise.

        Raises:
            AdapterError: base is not a linear we know, or has no such rank.
        """
        super().__init__(base, place, config, seed=seed, rank=rank, scale=scale)
        if rank is None and not self.lora_A.is_meta:
            weight = dense_weight(base, torch.float32)
            set_factors(self, *leading_factors(weight, self.rank, seeded(place, seed)))
        self.register_buffer("start_a", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("start_b", self.lora_B.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and, unless switched off, what A and B have moved from their start.

        Args:
            x: (..., K).

        Returns:
            (..., N) in the dtype the base answers with.
        """
        if not self.enabled:
            return self.base(x)
        a, b = torch.cat([self.lora_A, self.start_a]), torch.cat([self.lora_B, -self.start_b], 1)
        if not self.training or self.dropout == 0.0:
            return self.with_pair(x, a, b)
        y = self.base(x)
        # only of what is trained; the start belongs to the base
        dropped, (moving, start) = F.dropout(x, self.dropout), a.to(x.dtype).chunk(2)
        z = torch.cat([F.linear(dropped, moving), F.linear(x, start)], -1)
        return self.add_product(y, z, b)

    @property
    def terms(self) -> list[Term]:
        """What is trained, less where it started."""
        return [*super().terms, Term(self.start_a, self.start_b, -self.scale)]

    @property
    def columns(self) -> int:
        """Of both terms."""
        return 2 * self.rank

    def pull_back(
        self, d_a: Tensor | None, d_b: Tensor | None, d_lengths: Tensor | None = None
    ) -> list[Tensor | None]:
        """Turn gradients of the joint factors into those of A and B.

        Args:
            d_a: (2r, K) float32, or None where it is not needed.
            d_b: (N, 2r) float32, likewise.
            d_lengths: None.

        Returns:
            As `masters`, in their dtypes; None for what is frozen.
        """
        of_a = None if d_a is None else d_a[: self.rank]
        return super().pull_back(of_a, None if d_b is None else d_b[:, : self.rank])

    def state(self) -> dict[str, Tensor]:
        """A and B, and where they started."""
        return super().state() | {"start_a": self.start_a, "start_b": self.start_b}

    def low_rank(self) -> LowRank:
        """Describe the change as one of rank 2r."""
        a = torch.cat([self.lora_A, self.start_a]).detach()
        b = torch.cat([self.lora_B, -self.start_b], 1).detach()
        return LowRank(a, b, self.scale)

    def own_state(self, pair: LowRank) -> dict[str, Tensor]:
        """Split what `low_rank` joined."""
        (a, first_a), (b, first_b) = pair.a.chunk(2), pair.b.chunk(2, 1)
        return {"lora_A": a, "lora_B": b, "start_a": first_a, "start_b": -first_b}

    def merge_delta(self) -> Tensor:
        """Compute s·(B·A - B₀·A₀).

        Returns:
            (N, K) float32, on the device of A.
        """
        return self.low_rank().delta()


def set_factors(piece: LowRankLinear, left: Tensor, right: Tensor) -> None:
    """Let s·B·A of a piece be left·right, in equal parts.

    Args:
        piece: changed in place.
        left: (N, r).
        right: (r, K).
    """
    share = abs(piece.scale) ** -0.5
    with torch.no_grad():
        piece.lora_A.copy_(right * share)
        piece.lora_B.copy_(left * share)
