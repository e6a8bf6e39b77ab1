"""`NF4Experts`: the fused experts of a mixture-of-experts block, frozen in 4 bits.

transformers keeps the experts of one layer in two stacked parameters,

    gate_up_proj   (E, 2I, H)    gate and up projections, one above the other
    down_proj      (E, H, I)

so replacing `nn.Linear` alone would leave most of such a model in 16 bits. Each
stack becomes one NF4 weight, stored as `NF4Linear` stores its own, and a token's
experts run through `nf4_linear` one by one. How gate and up combine is asked of
the replaced module (`_apply_gate`), so that a family's own activation and clamp
stay what they are; the routing arithmetic is that of transformers' eager loop,
in the same order of summation.

Not every layout is covered: experts with biases, without a gate, stored (in, out)
or with a norm of their own stay dense, and the loader says so.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_kit.core.errors import NonFiniteError, ShapeError
from qlora_kit.nn.linear import bytes_to_weight, register_bytes, weight_to_bytes
from qlora_kit.ops.autocast import autocast_dtype
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.ops.nf4_quantize.op import nf4_quantize, nf4_quantize_absmax
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.double_quant import GROUP_SIZE
from qlora_kit.quant.weight import NF4Weight

PROJECTIONS = ("gate_up_proj", "down_proj")
"""Names of the two stacked parameters."""


def is_fused_experts(module: nn.Module) -> bool:
    """Tell whether a module holds stacked experts of any layout.

    Args:
        module: any module.

    Returns:
        True if it has two three-dimensional projections of its own.

    Example:
        >>> is_fused_experts(nn.Linear(2, 2))
        False
    """
    owned = [module._parameters.get(name) for name in PROJECTIONS]
    return all(parameter is not None and parameter.dim() == 3 for parameter in owned)


def unsupported_reason(module: nn.Module, config: QuantConfig) -> str | None:
    """Why stacked experts cannot be quantized, if so.

    Args:
        module: one for which `is_fused_experts` is true.
        config: how the weights would be stored.

    Returns:
        The reason in a few words, or None if nothing stands against it.
    """
    if not hasattr(module, "_apply_gate") or not getattr(module, "has_gate", False):
        return "they have no gate"
    if getattr(module, "has_bias", False):
        return "they have biases"
    if getattr(module, "is_transposed", False):
        return "they are stored transposed"
    if getattr(module, "has_post_expert_norm", False):
        return "they have a norm of their own"
    for name in PROJECTIONS:
        _, n, k = module.get_parameter(name).shape
        if n * k % config.block_size:
            return f"{n} x {k} weights are no whole blocks of {config.block_size}"
    return None


class Experts(Protocol):
    """Experts that can be counted and then read once: a list, a stacked tensor, a stream."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """Give one (N, K) tensor after another."""
        ...


def quantize_stack(
    experts: Experts,
    config: QuantConfig,
    *,
    name: str = "experts",
    watch: Callable[[Tensor], None] | None = None,
) -> NF4Weight:
    """Quantize experts one after another into one stacked weight.

    The result equals quantizing the (E, N, K) stack, which is never built: peak
    memory is one expert beside the codes.

    Args:
        experts: E tensors (N, K) of one shape and float dtype, whole blocks each.
        config: how to store them.
        name: what to call the weight in an error.
        watch: gets all blocks' scales, (E * blocks,) float32, instead of their being checked.

    Returns:
        The (E, N, K) weight.

    Raises:
        NonFiniteError: an expert holds NaN or infinity, and nobody watches.
        ShapeError: there are no experts, their shapes differ or are no whole blocks.

    Example:
        >>> quantize_stack([torch.randn(4, 64), torch.randn(4, 64)], QuantConfig()).shape
        (2, 4, 64)
    """
    count = len(experts)
    packed, absmax = torch.empty(0), torch.empty(0)
    shape: tuple[int, ...] = ()
    dtype = torch.float32
    for index, expert in enumerate(experts):
        if index == 0:
            shape, dtype = tuple(expert.shape), expert.dtype
            size, blocks = expert.numel(), expert.numel() // config.block_size
            packed = expert.new_empty((count * size // 2, 1), dtype=torch.uint8)
            absmax = expert.new_empty(count * blocks, dtype=torch.float32)
        if tuple(expert.shape) != shape or size % config.block_size:
            raise ShapeError(
                f"{name} needs experts of one shape and whole blocks of {config.block_size}, got "
                f"{tuple(expert.shape)} for expert {index} and {shape} for the first."
            )
        codes, scales = nf4_quantize(expert, block_size=config.block_size)
        if watch is None and not torch.isfinite(scales).all():
            raise NonFiniteError(
                f"{name} holds NaN or infinite values in expert {index} and cannot be quantized. "
                "Repair the checkpoint, or leave this module in 16 bits with QuantConfig(skip=...)."
            )
        packed[index * size // 2 : (index + 1) * size // 2] = codes
        absmax[index * blocks : (index + 1) * blocks] = scales
    if not shape:
        raise ShapeError(f"{name} needs at least one expert, got none.")
    if watch is not None:
        watch(absmax)
    nested = offset = None
    if config.double_quant:
        absmax, nested, offset = nf4_quantize_absmax(absmax)
    return NF4Weight(
        packed=packed,
        absmax=absmax,
        nested_absmax=nested,
        offset=offset,
        shape=(count, *shape),
        block_size=config.block_size,
        dtype=dtype,
    )


class NF4Experts(nn.Module):
    """Stacked experts with frozen NF4 weights; a drop-in for transformers' module.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 2}
        >>> dense = MixtralExperts(MixtralConfig(**sizes))
        >>> for parameter in dense.parameters():
        ...     _ = nn.init.normal_(parameter)
        >>> experts = NF4Experts.from_experts(dense, QuantConfig())
        >>> route = torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
        >>> experts(torch.randn(3, 64), *route).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        source: nn.Module,
        config: QuantConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Make experts with empty parameters; `set_weight` or a loader fills them.

        Args:
            source: the module that is replaced; asked for its sizes and its gate,
                its parameters are not kept.
            config: how the weights are stored.
            dtype: the weights decode to by default.
            device: where the parameters live.

        Raises:
            ShapeError: the layout is not one this class can compute.
        """
        super().__init__()
        reason = unsupported_reason(source, config)
        if reason is not None:
            raise ShapeError(
                f"{type(source).__name__} cannot be quantized: {reason}. "
                "Leave it in 16 bits with QuantConfig(skip=...)."
            )
        self.config = config
        self.dtype = dtype
        self.shapes = {name: tuple(source.get_parameter(name).shape) for name in PROJECTIONS}
        self.weight_dtypes = dict.fromkeys(PROJECTIONS, dtype)
        self.num_experts = self.shapes[PROJECTIONS[0]][0]
        for name, shape in self.shapes.items():
            register_bytes(self, name, shape, config, device=device)
        # In a tuple, so that it is no submodule: it has no parameters, only a gate.
        self._source: tuple[Any] = (_without_parameters(source),)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        config: QuantConfig,
        *,
        name: str = "experts",
    ) -> "NF4Experts":
        """Quantize existing stacked experts.

        Args:
            experts: transformers' module; not modified.
            config: how to store the weights.
            name: what to call the module in an error.

        Returns:
            A new module on the same device.

        Raises:
            NonFiniteError: a weight holds NaN or infinity.
            ShapeError: the layout is not one this class can compute.
        """
        first = experts.get_parameter(PROJECTIONS[0])
        made = cls(experts, config, dtype=first.dtype, device=first.device)
        for projection in PROJECTIONS:
            stack = experts.get_parameter(projection).detach()
            made.set_weight(projection, quantize_stack(stack, config, name=f"{name}.{projection}"))
        return made

    def nf4_weight(self, projection: str) -> NF4Weight:
        """One stacked weight, sharing storage with the parameters.

        Args:
            projection: one of `PROJECTIONS`.

        Returns:
            The (E, N, K) weight.
        """
        return bytes_to_weight(
            self,
            projection,
            shape=self.shapes[projection],
            config=self.config,
            dtype=self.weight_dtypes[projection],
        )

    def set_weight(self, projection: str, weight: NF4Weight) -> None:
        """Take over another weight's bytes.

        Args:
            projection: one of `PROJECTIONS`.
            weight: (E, N, K), stored as this module's config says.

        Raises:
            ShapeError: the shape, block size or double quantization differs.
        """
        came = (weight.shape, weight.block_size, weight.nested_absmax is not None)
        wanted = (self.shapes[projection], self.config.block_size, self.config.double_quant)
        if came != wanted:
            raise ShapeError(
                f"{projection} needs (shape, block_size, double_quant) = {wanted}, got {came}."
            )
        for name, data in weight_to_bytes(weight, projection).items():
            setattr(self, name, nn.Parameter(data, requires_grad=False))
        self.weight_dtypes[projection] = weight.dtype

    def dequantize(self, projection: str, dtype: torch.dtype | None = None) -> Tensor:
        """Decode one stacked weight.

        Args:
            projection: one of `PROJECTIONS`.
            dtype: of the result; None for the module's own.

        Returns:
            (E, N, K).
        """
        return self.nf4_weight(projection).dequantize(dtype or self.dtype)

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The replaced module again, with decoded weights.

        Args:
            dtype: of the weights; None for the module's own.

        Returns:
            A dense module on the same device.
        """
        dense: nn.Module = copy.copy(self._source[0])
        dense._parameters = {
            name: nn.Parameter(self.dequantize(name, dtype)) for name in PROJECTIONS
        }
        return dense.train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send each token through its experts and add up their weighted outputs.

        Args:
            hidden_states: (T, H). Under autocast, products run in its dtype.
            top_k_index: (T, k) int64, the experts of each token; E or more for none.
            top_k_weights: (T, k), their routing weights.

        Returns:
            (T, H) in the dtype of hidden_states.
        """
        x = hidden_states
        if (dtype := autocast_dtype(x.device)) is not None:
            x = x.to(dtype)
        gate_up, down = (_cheap_to_select(self.nf4_weight(name)) for name in PROJECTIONS)
        out = torch.zeros_like(hidden_states)
        for expert, slot, token in _routes(top_k_index, self.num_experts):
            gated = self._source[0]._apply_gate(nf4_linear(x[token], gate_up.select(expert)))
            y = nf4_linear(gated, down.select(expert)) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        sizes = ", ".join(f"{name}={shape}" for name, shape in self.shapes.items())
        return f"{sizes}, nf4, block_size={self.config.block_size}"


def _routes(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that is asked, and the slots and tokens that ask it.

    On the meta device, where nobody knows, every expert is asked by an equal share.
    """
    if top_k_index.is_meta:
        share = top_k_index.new_empty(-(-top_k_index.numel() // experts))
        yield from ((expert, share, share) for expert in range(experts))
        return
    slots = top_k_index.T  # by slot first: the eager loop's order of summation
    for expert in torch.unique(top_k_index).tolist():
        if expert < experts:
            yield expert, *torch.where(slots == expert)


def _without_parameters(module: nn.Module) -> nn.Module:
    """A shallow copy that shares everything with a module but its own parameters."""
    bare = copy.copy(module)
    bare._parameters = {}
    return bare


def _cheap_to_select(stack: NF4Weight) -> NF4Weight:
    """The same stack, scales decoded once if each `select` would have to decode them all."""
    _, n, k = stack.shape
    if stack.nested_absmax is None or n * k // stack.block_size % GROUP_SIZE == 0:
        return stack
    return replace(stack, absmax=stack.scales(), nested_absmax=None, offset=None)
