"""AdaLoRA on one linear layer: y = base(x) + s·P·Λ·(Q·x), a singular value decomposition trained.

Shapes: x (..., K), Q (r, K), λ (r, 1), P (N, r), y (..., N); ΔW = s·P·diag(λ)·Q with
s = alpha/r₀, r₀ the rank at the start, whatever rank is left later. λ starts at zero, so that
the adapted model starts as the base; P and Q start from N(0, 0.02²). The names in state and
files are PEFT's: `lora_A` is Q, `lora_E` is λ, `lora_B` is P.

`rank_allocator.RankAllocator` sets the λ of unimportant triplets (P's column, λ, Q's row) to zero
while training; P and Q are trained on, so that a triplet can come back until ranks are final.
A merge leaves out triplets whose λ is zero.

The product runs as LoRA's with A = diag(λ)·Q, so NF4 bases take it in their one pass and keep
x and x·Aᵀ for the backward, no more than LoRA; autograd goes on from A to λ and Q. With
dropout, or on a dense base, it is plain torch. A layer that runs as one step takes the same
A, and gives its gradient D back: dQ = s·diag(λ)·D, dλ_j = s·Σ_k D_jk·Q_jk (`pull_back`).

P and Q stay about orthogonal through a term in the loss, in two forms (`orthogonality`):

    paper   R = Σ over matrices of ‖PᵀP − I‖²_F + ‖QQᵀ − I‖²_F
    code    R = mean over all P and Q of ‖PᵀP − I‖_F, not squared (the default)

The sum of squares of a large model outweighs its task: for 224 matrices of rank 12 it starts
at 5,400, the mean of norms at 3.5. Both are computed in float32. Their gradients are known: with
D = QQᵀ − I, dQ is 4·D·Q and 2·D·Q/(n·‖D‖_F), n the number of matrices, and zero where D is; dP
likewise is P·(PᵀP − I) times the same. `add_orthogonality` adds them where an update's gradients
are complete: a few batched products per shape of matrices, however many layers there are.

Defaults: rank 12 → 8 on average, γ 0.1, β₁ = β₂ = 0.85, ΔT 100. In a run the start rank is
`adapter.rank`, which is 16 for all methods: 16 → 10 where nothing is said.

Source: arXiv:2303.10512 and the authors' code, github.com/QingruZhang/AdaLoRA.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.layer import FusibleLinear
from qlora_kit.adapters.lora.low_rank import LowRank

_START_STD = 0.02


class AdaLoRALinear(FusibleLinear):
    """A linear with a trained singular value decomposition beside it.

    Attributes:
        base: the frozen linear.
        lora_A: (r, K), Q in the master dtype.
        lora_E: (r, 1), λ; zero at the start.
        lora_B: (N, r), P.
        scale: s.

    Example:
        >>> from qlora_kit.adapters.adalora.config import AdaLoRA
        >>> linear = nn.Linear(8, 4)
        >>> adapted = AdaLoRALinear(linear, "proj", AdaLoRA(rank=2, alpha=4), seed=0)
        >>> x = torch.ones(3, 8)
        >>> torch.equal(adapted(x), linear(x))  # λ is zero
        True
        >>> sorted(adapted.trainable()), adapted.scale
        (['lora_A', 'lora_B', 'lora_E'], 2.0)
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
            base: one of `linears.LINEARS`. Not modified.
            place: its dotted name in the model.
            config: start rank, alpha, dropout and dtype.
            seed: the run's.
            rank: of an adapter read from a file, from which triplets may have been removed;
                the scale is the start rank's all the same.
            scale: likewise.

        Raises:
            AdapterError: base is not a linear we know.
        """
        super().__init__(base, place, config, seed=seed, rank=rank, scale=scale)
        device, dtype = self.lora_A.device, self.lora_A.dtype
        if device.type != "meta":
            for letter, matrix in (("Q", self.lora_A), ("P", self.lora_B)):
                matrix.data = _gaussian(f"{seed}:{place}:{letter}", matrix.shape).to(device, dtype)
        self.lora_E = nn.Parameter(torch.zeros(self.rank, 1, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and, unless switched off, the low-rank branch.

        Args:
            x: (..., K).

        Returns:
            (..., N) in the dtype the base answers with.
        """
        if not self.enabled or self.rank == 0:
            return self.base(x)
        return self.with_pair(x, self.lora_E * self.lora_A, self.lora_B)

    @property
    def masters(self) -> list[nn.Parameter]:
        """Q, λ and P."""
        return [self.lora_A, self.lora_E, self.lora_B]

    @property
    def row_factors(self) -> Tensor:
        """λ."""
        return self.lora_E

    @property
    def needs_gradient_of_a(self) -> bool:
        """Whether λ or Q is trained."""
        return self.lora_A.requires_grad or self.lora_E.requires_grad

    def pull_back(
        self, d_a: Tensor | None, d_b: Tensor | None, d_lengths: Tensor | None = None
    ) -> list[Tensor | None]:
        """Turn gradients of s·diag(λ)·Q and P into those of Q, λ and P.

        Args:
            d_a: (r, K) float32, or None where it is not needed.
            d_b: (N, r) float32, likewise.
            d_lengths: None.

        Returns:
            As `masters`, in their dtypes; None for what is frozen.
        """
        of_q = of_values = None
        if d_a is not None:
            q, values = self.lora_A.detach(), self.lora_E.detach()
            scaled = d_a * self.scale
            if self.lora_E.requires_grad:
                of_values = (scaled * q).sum(1, keepdim=True).to(values.dtype)
            if self.lora_A.requires_grad:
                of_q = (scaled * values).to(q.dtype)
        return [of_q, of_values, None if d_b is None else d_b.to(self.lora_B.dtype)]

    def trainable(self) -> dict[str, nn.Parameter]:
        """P, λ and Q; those of removed triplets as well, which can come back."""
        return {"lora_A": self.lora_A, "lora_E": self.lora_E, "lora_B": self.lora_B}

    def state(self) -> dict[str, Tensor]:
        """P, λ and Q."""
        return {"lora_A": self.lora_A, "lora_E": self.lora_E, "lora_B": self.lora_B}

    def merge_delta(self) -> Tensor:
        """Compute s·P·diag(λ)·Q over the triplets whose λ is not zero.

        Returns:
            (N, K) float32, on the device of P.
        """
        a, b = self.lora_A.detach(), self.lora_B.detach()
        return LowRank(a, b, self.scale, values=self.lora_E.detach()).delta()

    def extra_repr(self) -> str:
        """Show what distinguishes this branch."""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}, svd"


def orthogonality(modules: Iterable[AdaLoRALinear], form: str = "code") -> Tensor:
    """Measure how far P and Q are from orthogonal, for the loss.

    Matrices of one shape are treated together, so that a large model costs a few launches.

    Args:
        modules: of one adapter, on one device.
        form: `code` or `paper`; see the module's text.

    Returns:
        () float32, without γ; autograd knows its gradient.

    Example:
        >>> from qlora_kit.adapters.adalora.config import AdaLoRA
        >>> layer = AdaLoRALinear(nn.Linear(8, 4), "proj", AdaLoRA(rank=2), seed=0)
        >>> with torch.no_grad():
        ...     _ = nn.init.orthogonal_(layer.lora_A), nn.init.orthogonal_(layer.lora_B)
        >>> bool(orthogonality([layer]) < 1e-5), bool(orthogonality([layer], "paper") < 1e-10)
        (True, True)
    """
    groups = list(_alike(modules).items())
    with _float32(groups[0][1][0].device):
        norms = [_lengths(_distances(torch.stack(g).float(), tall)) for (tall, *_), g in groups]
        return _total(torch.cat(norms), form)


@torch.no_grad()
def add_orthogonality(
    modules: Iterable[AdaLoRALinear],
    weight: float,
    form: str = "code",
    *,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """Add the gradient of γ·R to `.grad`, as if R had been in the loss.

    Args:
        modules: of one adapter, on one device, behind an update's backward passes.
        weight: γ.
        form: `code` or `paper`; see the module's text.
        loss_scale: () what gradients are multiplied by for now, in a float16 run.

    Returns:
        () float32, γ·R.

    Example:
        >>> from qlora_kit.adapters.adalora.config import AdaLoRA
        >>> layer = AdaLoRALinear(nn.Linear(8, 4), "proj", AdaLoRA(rank=2), seed=0)
        >>> value = add_orthogonality([layer], 0.1)
        >>> torch.equal(value, 0.1 * orthogonality([layer]))
        True
        >>> layer.lora_A.grad.shape, layer.lora_E.grad is None
        (torch.Size([2, 8]), True)
    """
    groups = list(_alike(modules).items())
    count, found = sum(len(group) for _, group in groups), []
    with _float32(groups[0][1][0].device):
        for (tall, *_), group in groups:
            stack = torch.stack(group).float()
            distances = _distances(stack, tall)
            norms = _lengths(distances)
            found.append(norms)
            if form == "paper":
                factor = torch.full_like(norms, 4.0 * weight)
            else:
                factor = (norms.reciprocal() * (2.0 * weight / count)).nan_to_num_(math.nan, 0.0)
            if loss_scale is not None:
                factor = factor * loss_scale
            distances.mul_(factor[:, None, None])
            product = torch.bmm(stack, distances) if tall else torch.bmm(distances, stack)
            _add_gradients(group, product)
        return weight * _total(torch.cat(found), form)


def _alike(modules: Iterable[AdaLoRALinear]) -> dict[tuple[object, ...], list[Tensor]]:
    """Matrices of one shape and dtype, by whether they are P (tall) and by these."""
    found: dict[tuple[object, ...], list[Tensor]] = {}
    for module in modules:
        for tall, matrix in ((False, module.lora_A), (True, module.lora_B)):
            key = (tall, matrix.shape, matrix.dtype)
            found.setdefault(key, []).append(matrix)
    return found


def _float32(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast; a meta device has none in torch."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _distances(stack: Tensor, tall: object) -> Tensor:
    """PᵀP − I or QQᵀ − I of matrices of one shape, (count, r, r) float32."""
    gram = torch.bmm(stack.mT, stack) if tall else torch.bmm(stack, stack.mT)
    torch.diagonal(gram, dim1=1, dim2=2).sub_(1.0)
    return gram


def _lengths(distances: Tensor) -> Tensor:
    """Norms, (count,); their gradient at 0 is 0, not NaN."""
    return torch.linalg.vector_norm(distances, dim=(1, 2))


def _total(norms: Tensor, form: str) -> Tensor:
    return norms.square().sum() if form == "paper" else norms.mean()


def _add_gradients(parameters: Sequence[Tensor], product: Tensor) -> None:
    """Add what belongs to each, (count, ...) float32, to the gradients of those that train."""
    parts = product.to(parameters[0].dtype).unbind()
    sums, more = [], []
    for parameter, part in zip(parameters, parts, strict=True):
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = part
        else:
            sums.append(parameter.grad)
            more.append(part)
    if sums:
        torch._foreach_add_(sums, more)


def _gaussian(name: str, shape: tuple[int, ...]) -> Tensor:
    """N(0, 0.02²) values that depend on the name alone, on the CPU."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.empty(shape).normal_(0.0, _START_STD, generator=generator)
