"""GLoRA on one linear: W* = W + W⊙A + B, b* = b + b⊙D + E + W·C, W and b frozen.

Shapes: x (..., K), y (..., N); A_d, B_d (N, r), A_u, B_u (r, K), C_d (K, r), C_u (r, 1),
D, E (N,). A support that is a vector is X_d of one column, a scalar X_d of one value, and
none has no parameter. X_d, D and E start at zero and X_u Xavier uniform, so that the adapted
model starts as the base.

W⊙A is never formed. On an NF4 weight, which has no elementwise product, a product of rank r is

    (W⊙(A_d·A_u))·x = Σ_k A_d[:, k] ⊙ (Ŵ·(A_u[k] ⊙ x))

r passes of the base, of which only x is kept. Backwards, with g = dL/dy and M = (gᵀx)⊙Ŵ,

    dA_d = M·A_uᵀ      dA_u = A_dᵀ·M      dx = Σ_k A_u[k] ⊙ (Ŵᵀ·(A_d[:, k] ⊙ g))

M a few rows at a time in float32; the weight is decoded once, for the time of the call. A
vector or scalar A needs no pass: y − b is W·x. B is LoRA with s = 1, in the base's pass where
it can be; a vector or scalar B is one with a row of ones; W·C is the base on one row.

*Super-net.* With `super_net` every linear holds the largest form of every support, and
`choice` says which part of it is used: a vector is X_d[:, 0], a scalar X_d[0, 0], so all 432
structures share values. The trainer draws `choice` for every batch; `super_net.search` looks
for the best and cuts it out.

A linear without a bias has no D, and gets E + W·C as a new bias. LoRA is the structure
`none lora none none none`. Defaults: rank 4, `lora lora lora vector vector`.

Source: arXiv:2306.07967 and the authors' code, github.com/Arnav0400/ViT-Slim (GLoRA).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.glora.config import GLoRA, Structure, support_shapes
from qlora_kit.adapters.linears import linear_shape, seeded
from qlora_kit.adapters.protocol import LinearWrapper
from qlora_kit.adapters.targets import linear_targets
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.autocast import autocast_dtype
from qlora_kit.ops.nf4_linear.op import nf4_linear

_ROWS = 1024
"""Rows of M at a time."""

Parts = dict[str, Tensor]


class GLoRALinear(LinearWrapper):
    """A linear whose weight and bias are scaled and shifted; takes the linear's place.

    Attributes:
        base: the frozen linear.
        supports: `A_d`, `A_u`, ... of those that are there, in the master dtype.
        structure: the forms of what it holds.
        choice: the forms that count now; another than `structure` in a super-net only.

    Example:
        >>> linear = nn.Linear(8, 4)
        >>> adapted = GLoRALinear(linear, "proj", GLoRA(rank=2), seed=0)
        >>> x = torch.ones(3, 8)
        >>> torch.equal(adapted(x), linear(x))  # nothing is scaled or shifted yet
        True
        >>> sorted(adapted.trainable())
        ['A_d', 'A_u', 'B_d', 'B_u', 'C_d', 'C_u', 'D', 'E']
    """

    def __init__(self, base: nn.Module, place: str, config: GLoRA, *, seed: int) -> None:
        """Wrap one linear; freezing it is left to `attach`, which can also undo it.

        Args:
            base: one of `linears.LINEARS`. Not modified.
            place: its dotted name in the model.
            config: rank, structure and dtype.
            seed: the run's.

        Raises:
            AdapterError: base is not a linear we know.
        """
        super().__init__(base, place)
        self.out_features, self.in_features = linear_shape(base)
        self.rank, self.super_net = config.rank, config.super_net
        self.has_bias = base.bias is not None
        whole = Structure() if config.super_net else config.structure_of(place)
        self.structure = self.choice = whole.on(bias=self.has_bias)
        like = next(base.parameters())
        dtype = getattr(torch, config.dtype)
        self.supports = nn.ParameterDict()
        for name, shape in support_shapes(
            self.structure, self.out_features, self.in_features, self.rank
        ).items():
            value = torch.zeros(shape, dtype=dtype, device=like.device)
            if name.endswith("_u") and like.device.type != "meta":
                bound = math.sqrt(6.0 / sum(shape))
                start = torch.empty(shape)
                start.uniform_(-bound, bound, generator=seeded(f"{place}:{name}", seed))
                value.copy_(start)
            self.supports[name] = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and what the supports add.

        Args:
            x: (..., K).

        Returns:
            (..., N) in the dtype the base answers with.
        """
        if not self.enabled:
            return self.base(x)
        in_pass = (  # B in the base's own pass, as LoRA; a vector or scalar A needs W·x alone
            isinstance(self.base, NF4Linear)
            and self.choice.b == "lora"
            and self.choice.a in ("lora", "none")
        )
        factors = (self.supports["B_u"], self.supports["B_d"], 1.0) if in_pass else ()
        y = self.base(x, *factors)
        rows = x.to(autocast_dtype(x.device) or x.dtype).reshape(-1, self.in_features)
        parts = self.parts(rows.dtype)
        out = y.reshape(-1, self.out_features)
        total = out
        form = self.choice.a
        if form in ("vector", "scalar"):
            product = out if self.bias is None else out - self.bias.to(out.dtype)
            total = total + product * parts["A"].T
        elif form == "lora":
            total = total + _Hadamard.apply(rows, parts["A_d"], parts["A_u"], self.base)
        if self.choice.b == "lora" and not in_pass:
            total = torch.addmm(total, F.linear(rows, parts["B_u"]), parts["B_d"].T)
        elif "B" in parts:
            total = torch.addmm(total, rows.sum(-1, keepdim=True), parts["B"].T)
        shift = self._shift(parts, rows.dtype)
        if shift is not None:
            total = total + shift.to(total.dtype)
        return total.view(y.shape)

    def _shift(self, parts: Parts, dtype: torch.dtype) -> Tensor | None:
        """b⊙D + E + W·C, or None; (N,) or (1,) float32."""
        terms: list[Tensor] = []
        if "D" in parts and self.bias is not None:
            terms.append(self.bias.float() * parts["D"])
        if "E" in parts:
            terms.append(parts["E"])
        if "C" in parts:
            row = parts["C"].to(dtype).reshape(1, -1)
            terms.append(apply_weight(self.base, row).reshape(-1).float())
        if not terms:
            return None
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def parts(self, dtype: torch.dtype) -> Parts:
        """What counts of the supports, by `choice`, cast.

        Args:
            dtype: of the products.

        Returns:
            `A_d` and `A_u` or `A`, likewise B, in that dtype; `C` (K,) worked out, `D` and `E`
            in float32: they are small.
        """
        found: Parts = {}
        held, choice = self.supports, self.choice
        for letter, form in (("A", choice.a), ("B", choice.b)):
            if form == "lora":
                found[f"{letter}_d"] = held[f"{letter}_d"].to(dtype)
                found[f"{letter}_u"] = held[f"{letter}_u"].to(dtype)
            elif form != "none":
                value = _cut(held[f"{letter}_d"], form)
                found[letter] = value.expand(self.out_features, 1).to(dtype)
        if choice.c == "lora":
            found["C"] = (held["C_d"].float() @ held["C_u"].float()).reshape(-1)
        elif choice.c == "vector":
            found["C"] = held["C_d"][:, 0].float()
        for letter, form in (("D", choice.d), ("E", choice.e)):
            if form != "none":
                found[letter] = (held[letter][:1] if form == "scalar" else held[letter]).float()
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every support that the structure has."""
        return dict(self.supports.items())

    def state(self) -> dict[str, Tensor]:
        """Every support that the structure has."""
        return dict(self.supports.items())

    def cut(self, structure: Structure) -> dict[str, Tensor]:
        """The values that a linear of a smaller structure takes over from a super-net.

        Args:
            structure: any.

        Returns:
            Key to tensor, in the shapes `support_shapes` gives.
        """
        own = structure.on(bias=self.has_bias)
        shapes = support_shapes(own, self.out_features, self.in_features, self.rank)
        found = {}
        for name, shape in shapes.items():
            value = self.supports[name].detach()
            for dimension, size in enumerate(shape):
                value = value.narrow(dimension, 0, size)
            found[name] = value
        return found

    def merge_delta(self) -> Tensor:
        """Compute W⊙A + B.

        Returns:
            (N, K) float32, on the device of the base. The bias is `merged_bias`.
        """
        weight = decode(self.base, torch.float32)
        parts = self.parts(torch.float32)
        delta = torch.zeros_like(weight)
        for letter, factor in (("A", weight), ("B", None)):
            change = None
            if f"{letter}_d" in parts:
                change = parts[f"{letter}_d"] @ parts[f"{letter}_u"]
            elif letter in parts:
                change = parts[letter].expand(self.out_features, self.in_features)
            if change is not None:
                delta += change if factor is None else factor * change
        return delta.detach()

    def merged_bias(self) -> Tensor | None:
        """Compute b + b⊙D + E + W·C.

        Returns:
            (N,) float32; None where there is neither a bias nor anything to add to none.
        """
        parts = self.parts(torch.float32)
        bias = None if self.bias is None else self.bias.detach().float()
        total = torch.zeros(self.out_features, device=self.weight.device) if bias is None else bias
        if bias is not None and "D" in parts:
            total = total + bias * parts["D"]
        if "E" in parts:
            total = total + parts["E"]
        if "C" in parts:
            total = total + decode(self.base, torch.float32) @ parts["C"]
        nothing = bias is None and not parts.keys() & {"C", "E"}
        return None if nothing else total.detach()

    def extra_repr(self) -> str:
        """Show what distinguishes this linear."""
        return f"rank={self.rank}, structure={self.structure}, super_net={self.super_net}"


def apply_weight(base: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear without its bias.

    Args:
        base: one of `linears.LINEARS`.
        x: (..., K).

    Returns:
        (..., N).

    Example:
        >>> linear = nn.Linear(2, 1).requires_grad_(False)
        >>> x = torch.ones(1, 2)
        >>> torch.allclose(apply_weight(linear, x) + linear.bias, linear(x))
        True
    """
    if isinstance(base, NF4Linear):
        return nf4_linear(x, base.nf4_weight, None)
    weight = base.get_parameter("weight").to(x.dtype)
    return F.linear(x, weight.T if isinstance(base, Conv1D) else weight)


def decode(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear's weight as a matrix.

    Args:
        base: one of `linears.LINEARS`.
        dtype: of the result. An NF4 weight is decoded as it computes, then cast.

    Returns:
        (N, K).

    Example:
        >>> decode(Conv1D(nf=3, nx=2), torch.float32).shape
        torch.Size([3, 2])
    """
    if isinstance(base, NF4Linear):
        return base.dequantize().to(dtype)
    weight = base.get_parameter("weight").detach().to(dtype)
    return weight.T if isinstance(base, Conv1D) else weight


def glora_pieces(
    model: nn.Module, config: GLoRA, seed: int, *, outside: Iterable[str] = ()
) -> list[GLoRALinear]:
    """Make the pieces of a GLoRA adapter; nothing is installed.

    Args:
        model: the model to adapt.
        config: rank, structures and targets.
        seed: of random starts, together with each module's name.
        outside: modules trained whole; nothing inside them is adapted.

    Returns:
        One per linear, in the model's order.

    Raises:
        AdapterError: the targets do not fit the model.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> [piece.place for piece in glora_pieces(model, GLoRA(), 0)]
        ['layers.0']
    """
    found = linear_targets(model, config.targets, outside=outside)
    pieces = [GLoRALinear(module, place, config, seed=seed) for place, module in found.items()]
    return [piece for piece in pieces if piece.supports]


def _cut(x_d: Tensor, form: str) -> Tensor:
    """X_d as a vector (N, 1) or a scalar (1, 1)."""
    return x_d[:, :1] if form == "vector" else x_d[:1, :1]


class _Hadamard(torch.autograd.Function):
    """(W⊙(A_d·A_u))·x without W⊙A; see the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_d: Tensor, a_u: Tensor, base: nn.Module) -> Tensor:
        ctx.save_for_backward(x, a_d, a_u)
        ctx.base = base
        total = x.new_zeros((x.shape[0], a_d.shape[0]), dtype=torch.float32)
        for k in range(a_d.shape[1]):
            total.addcmul_(apply_weight(base, x * a_u[k]).float(), a_d[:, k].float())
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        (g,) = gradients
        x, a_d, a_u = ctx.saved_tensors
        weight = decode(ctx.base, g.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for k in range(a_d.shape[1]):
                total.addcmul_(((g * a_d[:, k]) @ weight).float(), a_u[k].float())
            dx = total.to(x.dtype)
        down, up = a_d.float(), a_u.float()
        d_down, d_up = torch.empty_like(down), torch.zeros_like(up)
        for start in range(0, a_d.shape[0], _ROWS):
            part = slice(start, start + _ROWS)
            m = (g[:, part].T @ x).float() * weight[part].float()
            d_down[part] = m @ up.T
            d_up.addmm_(down[part].T, m)
        return dx, d_down.to(a_d.dtype), d_up.to(a_u.dtype), None
