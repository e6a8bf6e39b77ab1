"""`NF4Linear`: a frozen linear layer whose weight lives in 4 bits.

Its parameters are plain uint8 tensors, scales included. Mixed-precision
wrappers cast float parameters and leave bytes alone, so the scales keep every
bit under `.half()`, sharding and all-gather. The float32 scales are viewed, not
converted, when the op needs them.

    weight                 ((n+1)//2, 1)    packed codes
    weight_absmax          (blocks,)        8-bit codes, or (4·blocks,) bytes of float32
    weight_nested_absmax   (4·groups,)      bytes of float32; double quantization only
    weight_offset          (4,)             bytes of one float32; double quantization only
"""

from math import prod

import torch
from torch import Tensor, nn

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops.autocast import autocast_dtype
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.ops.nf4_quantize.op import quantize_weight
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.double_quant import GROUP_SIZE
from qlora_kit.quant.weight import NF4Weight


def byte_specs(shape: tuple[int, ...], config: QuantConfig, name: str) -> dict[str, int]:
    """How many bytes each stored parameter of one NF4 weight holds.

    Args:
        shape: of the weight.
        config: block size and double quantization.
        name: the weight's own name, the stem of the others.

    Returns:
        Parameter name to number of bytes; all are uint8.

    Example:
        >>> byte_specs((64, 64), QuantConfig(), "weight")["weight"]
        2048
    """
    blocks = -(-prod(shape) // config.block_size)
    sizes = {name: (prod(shape) + 1) // 2}
    if config.double_quant:
        sizes[f"{name}_absmax"] = blocks
        sizes[f"{name}_nested_absmax"] = 4 * -(-blocks // GROUP_SIZE)
        sizes[f"{name}_offset"] = 4
    else:
        sizes[f"{name}_absmax"] = 4 * blocks
    return sizes


def weight_to_bytes(weight: NF4Weight, name: str) -> dict[str, Tensor]:
    """The stored parameters of one NF4 weight, as views of its tensors.

    Args:
        weight: the weight.
        name: the weight's own name, the stem of the others.

    Returns:
        Parameter name to uint8 tensor, sized as `byte_specs` says.

    Example:
        >>> sorted(weight_to_bytes(NF4Weight.quantize(torch.randn(4, 64)), "weight"))
        ['weight', 'weight_absmax', 'weight_nested_absmax', 'weight_offset']
    """
    stored = {name: weight.packed.reshape(-1, 1)}
    for field, tensor in weight.tensors().items():
        if field != "packed":
            stored[f"{name}_{field}"] = tensor.contiguous().view(-1).view(torch.uint8)
    return stored


def bytes_to_weight(
    module: nn.Module,
    name: str,
    *,
    shape: tuple[int, ...],
    config: QuantConfig,
    dtype: torch.dtype,
) -> NF4Weight:
    """View a module's stored parameters as an NF4 weight.

    Args:
        module: holds the parameters `byte_specs` names.
        name: the weight's own name, the stem of the others.
        shape: of the weight.
        config: block size and double quantization.
        dtype: the weight decodes to by default.

    Returns:
        The weight; its tensors share storage with the parameters.
    """
    absmax = getattr(module, f"{name}_absmax")
    nested = offset = None
    if config.double_quant:
        nested = getattr(module, f"{name}_nested_absmax").view(torch.float32)
        offset = getattr(module, f"{name}_offset").view(torch.float32).view(())
    else:
        absmax = absmax.view(torch.float32)
    return NF4Weight(
        packed=getattr(module, name),
        absmax=absmax,
        nested_absmax=nested,
        offset=offset,
        shape=shape,
        block_size=config.block_size,
        dtype=dtype,
    )


def register_bytes(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    config: QuantConfig,
    *,
    device: torch.device | str | None,
) -> None:
    """Give a module empty stored parameters for one NF4 weight.

    Args:
        module: receives the parameters; none of them requires a gradient.
        name: the weight's own name, the stem of the others.
        shape: of the weight.
        config: block size and double quantization.
        device: where they live.
    """
    for parameter, size in byte_specs(shape, config, name).items():
        sizes = (size, 1) if parameter == name else (size,)
        data = torch.empty(sizes, dtype=torch.uint8, device=device)
        module.register_parameter(parameter, nn.Parameter(data, requires_grad=False))


class NF4Linear(nn.Module):
    """y = x·dequant(W)ᵀ + bias, with W frozen in NF4.

    Example:
        >>> layer = NF4Linear.from_linear(nn.Linear(64, 128), QuantConfig())
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        config: QuantConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        """Make a layer with empty parameters; `set_weight` or a loader fills them.

        Args:
            in_features: K.
            out_features: N.
            bias: whether there is one, (N,) of `dtype`.
            config: how the weight is stored.
            dtype: the weight decodes to by default, and of the bias.
            device: where the parameters live.
            transposed: the layer stands for a GPT-2 `Conv1D`, whose checkpoint
                holds the (K, N) transpose of the weight.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.dtype = dtype
        self.weight_dtype = dtype  # of the weight it was quantized from; goes into checkpoints
        self.transposed = transposed
        shape = (out_features, in_features)
        register_bytes(self, "weight", shape, config, device=device)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))
            self.bias.requires_grad_(False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: QuantConfig,
        *,
        name: str = "linear",
    ) -> "NF4Linear":
        """Quantize an existing layer.

        Args:
            linear: an `nn.Linear`, or a `Conv1D` whose weight is (K, N).
            config: how to store the weight.
            name: what to call the layer in an error.

        Returns:
            A new layer on the same device; `linear` is not modified.

        Raises:
            NonFiniteError: the weight holds NaN or infinity.
        """
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        transposed = not isinstance(linear, nn.Linear)
        matrix = weight.detach().T.contiguous() if transposed else weight.detach()
        layer = cls(
            matrix.shape[1],
            matrix.shape[0],
            bias=bias is not None,
            config=config,
            dtype=weight.dtype,
            device=weight.device,
            transposed=transposed,
        )
        quantized = quantize_weight(
            matrix,
            block_size=config.block_size,
            double_quant=config.double_quant,
            name=f"{name}.weight",
        )
        layer.set_weight(quantized)
        if isinstance(bias, Tensor):
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.out_features, self.in_features

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight, sharing storage with the parameters."""
        return bytes_to_weight(
            self, "weight", shape=self.shape, config=self.config, dtype=self.weight_dtype
        )

    def set_weight(self, weight: NF4Weight) -> None:
        """Take over another weight's bytes.

        Args:
            weight: (N, K), stored as this layer's config says.

        Raises:
            ShapeError: the shape, block size or double quantization differs.
        """
        double_quant = weight.nested_absmax is not None
        came = (weight.shape, weight.block_size, double_quant)
        wanted = (self.shape, self.config.block_size, self.config.double_quant)
        if came != wanted:
            raise ShapeError(
                f"set_weight needs (shape, block_size, double_quant) = {wanted}, got {came}."
            )
        for name, data in weight_to_bytes(weight, "weight").items():
            setattr(self, name, nn.Parameter(data, requires_grad=False))
        self.weight_dtype = weight.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight.

        Args:
            dtype: of the result; None for the layer's own.

        Returns:
            (N, K).
        """
        return nf4_dequantize(self.nf4_weight, dtype or self.dtype)

    def forward(
        self,
        x: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Apply the layer, with a low-rank branch in the same pass if one is given.

        Args:
            x: (..., K). Under autocast it is cast to the autocast dtype.
            lora_a: (r, K) or None.
            lora_b: (N, r) or None.
            scale: factor on the low-rank product.

        Returns:
            (..., N) in the dtype of x.
        """
        if (dtype := autocast_dtype(x.device)) is not None:
            x = x.to(dtype)
        return nf4_linear(x, self.nf4_weight, self.bias, lora_a=lora_a, lora_b=lora_b, scale=scale)

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nf4, block_size={self.config.block_size}, "
            f"double_quant={self.config.double_quant}"
        )
