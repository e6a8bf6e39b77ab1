"""What bitsandbytes decodes, for comparison bit for bit."""

import copy

import bitsandbytes.functional as bnb
import torch


def decoded(packed: torch.Tensor, state: bnb.QuantState, dtype: torch.dtype) -> torch.Tensor:
    """The values of tensors on the CPU, in `dtype`.

    On a machine with a GPU, bitsandbytes takes its code for the CPU from its CUDA library. There
    the conversion to float16 rounds ties away from zero, and all below the smallest denormal
    (2**-24) to zero. Its CPU library rounds to nearest even, like the format and this package. So
    on such a machine its float32 values are taken, and torch rounds them.
    """
    state = copy.copy(state)
    rounds = dtype != torch.float16 or not torch.cuda.is_available()
    state.dtype = dtype if rounds else torch.float32
    return bnb.dequantize_4bit(packed, state).to(dtype)
