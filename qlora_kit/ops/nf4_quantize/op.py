"""`nf4_quantize`: a float weight as NF4 codes and scales, and the scales as 8-bit codes.

Every backend gives the bits that the codec in `quant/` gives on the same device.
`quantize_weight` is `NF4Weight.quantize` with these ops in the codec's place:
modules, loading and exports quantize through it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.nf4_quantize import cuda, reference
from qlora_kit.quant.double_quant import GROUP_SIZE, check_absmax
from qlora_kit.quant.nf4 import check_quantizable
from qlora_kit.quant.weight import Codec, NF4Weight

OP = "nf4_quantize"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def nf4_quantize(weight: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize to NF4 on the fastest backend the weight's device has.

    NaN and infinity are not refused here: they show in the scale of their block.

    Args:
        weight: any shape, float32, float16 or bfloat16. Not modified, not differentiated.
        block_size: weights that share one scale; a power of two from 32 to 4096.

    Returns:
        packed: (ceil(n/2), 1) uint8 for n weights, the first of two in the high nibble.
        absmax: (ceil(n/block_size),) float32, in the units of `weight`.

    Raises:
        ShapeError: the weight is empty, not a float, or block_size is not supported.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> packed, absmax = nf4_quantize(torch.tensor([[-2.0, 0.0, 2.0, 1.0]]))
        >>> packed.flatten().tolist(), absmax.tolist()
        ([7, 252], [2.0])
    """
    check_quantizable(weight, block_size)
    packed, absmax = torch.ops.qlora_kit.nf4_quantize(weight.detach(), block_size)
    return packed, absmax


def nf4_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize scales to 8 bits on the fastest backend their device has.

    Args:
        absmax: (blocks,) float32, finite.

    Returns:
        codes: (blocks,) uint8, indices into the dynamic map.
        nested_absmax: (ceil(blocks/256),) float32, the groups' scales.
        offset: () float32, the mean that was taken off.

    Raises:
        ShapeError: absmax is not a non-empty float32 vector.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> codes, nested, offset = nf4_quantize_absmax(torch.tensor([1.0, 3.0]))
        >>> offset.item(), nested.item(), codes.tolist()
        (2.0, 1.0, [0, 255])
    """
    check_absmax(absmax)
    offset = absmax.mean()
    codes, nested_absmax = torch.ops.qlora_kit.nf4_quantize_scales(absmax, offset)
    return codes, nested_absmax, offset


_CODEC = Codec(nf4_quantize, nf4_quantize_absmax)


def quantize_weight(
    weight: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    name: str = "weight",
    watch: Callable[[Tensor], None] | None = None,
) -> NF4Weight:
    """Quantize a weight on the fastest backend its device has; see `NF4Weight.quantize`.

    Args:
        weight: (N, K) or (E, N, K), float32 / float16 / bfloat16. Not modified.
        block_size: weights that share one scale.
        double_quant: store the scales in 8 bits.
        name: what to call the weight in an error.
        watch: gets the blocks' scales, (blocks,) float32, instead of their being checked.

    Returns:
        The quantized weight, on the same device.

    Raises:
        NonFiniteError: the weight holds NaN or infinity, and nobody watches.
        ShapeError: the weight is empty or not a float.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> quantize_weight(torch.randn(4, 64)).shape
        (4, 64)
    """
    return NF4Weight.quantize(
        weight,
        block_size=block_size,
        double_quant=double_quant,
        name=name,
        codec=_CODEC,
        watch=watch,
    )


@torch.library.custom_op("qlora_kit::nf4_quantize", mutates_args=())
def _quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed, absmax = resolve(OP, weight).quantize(weight, block_size)
    return packed, absmax


@_quantize.register_fake
def _(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    packed = weight.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty(-(-count // block_size), dtype=torch.float32)


@torch.library.custom_op("qlora_kit::nf4_quantize_scales", mutates_args=())
def _quantize_scales(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    codes, nested_absmax = resolve(OP, absmax).quantize_scales(absmax, offset)
    return codes, nested_absmax


@_quantize_scales.register_fake
def _(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    blocks = absmax.numel()
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    return codes, absmax.new_empty(-(-blocks // GROUP_SIZE), dtype=torch.float32)
