"""LoftQ (`init: loftq`): a LoRA starts at what quantization took away.

s·B·A is the best approximation of rank r of W - Ŵ, W being the original weight, which is read
from the checkpoint again. That is the algorithm's first iteration; later ones would quantize
another base. The base stays, so files, PEFT and merging are LoRA's. The model does not start
as the quantized base but nearer to the original one; on a base that is not quantized
nothing was taken away, and the start is refused. A merge into the original weights is
refused as well: they never lost what the adapter gives back.

Only plain LoRA and rsLoRA start so, one linear at a time, with `pissa.leading_factors`.

Defaults: LoRA's, rank 16 and alpha 32, and one iteration; the paper has up to five.

Source: arXiv:2310.08659.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.adapters.linears import seeded
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.adapters.lora.pissa import leading_factors, set_factors
from qlora_kit.core.errors import AdapterError
from qlora_kit.nn.linear import NF4Linear

Originals = Callable[[str], Tensor]
"""Module name to its original weight, (N, K) of any float dtype."""


def start_at_error(piece: LoRALinear, originals: Originals | None, seed: int) -> None:
    """Give a new LoRA LoftQ's start: the error of quantization, at the piece's rank.

    Args:
        piece: changed in place.
        originals: the weights that were quantized.
        seed: the run's.

    Raises:
        AdapterError: there are no originals, they do not fit, or the base is not quantized.

    Example:
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> from qlora_kit.quant.config import QuantConfig
        >>> linear = torch.nn.Linear(64, 8)
        >>> base = NF4Linear.from_linear(linear, QuantConfig())
        >>> piece = LoRALinear(base, "proj", LoRA(rank=8), seed=0)
        >>> start_at_error(piece, lambda name: linear.weight, 0)
        >>> error = linear.weight - base.dequantize()
        >>> torch.allclose(piece.merge_delta(), error, atol=1e-6)
        True
    """
    if piece.lora_A.is_meta:
        return
    base = piece.base
    if not isinstance(base, NF4Linear):
        raise AdapterError(
            f"init loftq starts at the error of quantization, and {piece.place} is not quantized. "
            "Use model.bits 4, leave the module out of targets, or start with pissa or kaiming."
        )
    if originals is None:
        raise AdapterError(
            "init loftq needs the original weights beside the quantized ones. Pass "
            "attach(..., originals=qk.original_weights(path of the 16-bit model))."
        )
    weight = originals(piece.place).to(piece.lora_A.device, torch.float32)
    if tuple(weight.shape) != base.shape:
        raise AdapterError(
            f"the original of {piece.place} is {tuple(weight.shape)} and its base {base.shape}: "
            "they are of different models."
        )
    error = weight - base.dequantize(torch.float32)
    set_factors(piece, *leading_factors(error, piece.rank, seeded(piece.place, seed)))
