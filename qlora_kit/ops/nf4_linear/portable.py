"""`nf4_linear` fused for any GPU from Ampere on: W stays in 4 bits, in both directions.

`kernels/nf4_linear/portable.cu` decodes each weight once per block of up to 128 rows
of x, into the registers that feed the tensor cores; the low-rank product is extra
steps of the contraction and the bias part of the one write of the result. Where a
result has too few tiles for the GPU, blocks share the contraction: their float32
partial sums go to a workspace of at most 128 KiB per multiprocessor, and a second
kernel adds them in a fixed order. Results are the same bits every time.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.quant.weight import NF4Weight

_KERNELS = Kernels("nf4_linear/portable.cu")
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

# As in portable.cu.
_THREADS = 128
_ROWS = 128
_STEP = 64
_TOKENS = (32, 64, 128)
_LARGE = frozenset({(8, 0), (9, 0), (10, 0), (10, 3)})
"""Compute capabilities with 164 KiB of shared memory or more; others may have 100."""
_LARGE_STAGES_KIB = (44, 64)
_SMALL_STAGES_KIB = (28, 44)
"""What the stages of a block of fewer than 128 tokens, or of 128, take."""

_MOST_SPLITS = 16
_FEWEST_STEPS = 4
"""Steps of the contraction that a split has at least."""
_RESIDENT = {32: 3, 64: 3, 128: 2}
"""Blocks that a processor runs at once, by their tokens."""


def serves(x: Tensor, weight: NF4Weight) -> bool:
    """Tell whether a call can run here.

    Args:
        x: (M, K) or, for the transposed product, (M, N).
        weight: (N, K).

    Returns:
        True for bfloat16 and float16, N and K multiples of 64, scales per 64 weights,
        everything contiguous, x and the codes aligned to 16 bytes.

    Example:
        >>> weight = NF4Weight.quantize(torch.randn(128, 64))
        >>> serves(torch.empty(3, 64, dtype=torch.bfloat16), weight)
        True
        >>> serves(torch.empty(3, 64, dtype=torch.float32), weight)
        False
    """
    n, k = weight.shape
    return (
        x.dtype in _NAMES
        and x.shape[0] > 0
        and n % _STEP == 0
        and k % _STEP == 0
        and weight.block_size == _STEP
        and x.data_ptr() % 16 == 0
        and x.is_contiguous()
        and weight.packed.data_ptr() % 16 == 0
        and all(tensor.is_contiguous() for tensor in weight.tensors().values())
    )


def multiply(
    x: Tensor, weight: NF4Weight, bias: Tensor | None, xa: Tensor | None, lora_b: Tensor | None
) -> Tensor:
    """Compute x·Wᵀ + xa·Bᵀ + bias.

    Args:
        x: (M, K), on a CUDA device.
        weight: (N, K).
        bias: (N,) in the dtype of x, or None.
        xa: (M, r) in the dtype of x, or None.
        lora_b: (N, r) in the dtype of x, or None.

    Returns:
        (M, N) in the dtype of x.
    """
    rank = 0 if lora_b is None else lora_b.shape[1]
    return _launch("nf4_portable", x, weight, bias, xa, lora_b, rank, weight.shape[0])


def multiply_transposed(
    dy: Tensor, weight: NF4Weight, dyb: Tensor | None, lora_a: Tensor | None
) -> Tensor:
    """Compute dy·W + dyb·A.

    Args:
        dy: (M, N), on a CUDA device.
        weight: (N, K).
        dyb: (M, r) in the dtype of dy, or None.
        lora_a: (r, K) in the dtype of dy, or None.

    Returns:
        (M, K) in the dtype of dy.
    """
    rank = 0 if lora_a is None else lora_a.shape[0]
    name = "nf4_portable_transposed"
    return _launch(name, dy, weight, None, dyb, lora_a, rank, weight.shape[1])


@lru_cache(maxsize=1024)
def tiling(m: int, rows: int, depth: int, processors: int) -> tuple[int, int]:
    """Choose how a product is cut into blocks.

    The model counts the cycles of the busiest processor. Its constants come from the
    instructions and shared-memory accesses of a step, not from timings.

    Args:
        m: rows of x.
        rows: columns of the result, which are rows of the weight's operand.
        depth: length of the contraction, a multiple of 64.
        processors: multiprocessors of the GPU.

    Returns:
        tokens: rows of x per block: 32, 64 or 128.
        splits: blocks that share the contraction.

    Example:
        >>> tiling(1024, 14336, 4096, 108), tiling(64, 4096, 14336, 108)
        ((128, 1), (64, 10))
    """
    choices = []
    for tokens in _TOKENS:
        tiles = -(-m // tokens) * -(-rows // _ROWS)
        most = max(1, min(_MOST_SPLITS, depth // _STEP // _FEWEST_STEPS))
        for splits in range(1, most + 1):
            blocks = tiles * splits
            if splits == 1 or blocks <= _RESIDENT[tokens] * processors:
                steps = -(-depth // _STEP // splits)
                cycles = _cycles(tokens, steps, -(-blocks // processors))
                if splits > 1:
                    cycles += 5000 + 8 * m * rows * splits // (16 * processors)
                choices.append((cycles, splits, -tokens))
    _, splits, tokens = min(choices)
    steps = -(-depth // _STEP // splits)
    return -tokens, -(-depth // _STEP // steps)


def _cycles(tokens: int, steps: int, blocks: int) -> int:
    """Cycles of a processor that runs some blocks of some steps."""
    step = 256 + 8 * tokens  # looking 8192 weights up, and multiplying
    if blocks == 1:
        return 2500 + steps * step * 3 // 2  # alone, a block waits for its own latencies
    return 2500 * -(-blocks // _RESIDENT[tokens]) + blocks * steps * step


def _launch(
    name: str,
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    low: Tensor | None,
    adapter: Tensor | None,
    rank: int,
    rows: int,
) -> Tensor:
    """Run one product; `low` and `adapter` are the two sides of the low-rank one."""
    m, depth = x.shape
    processors, capability = _properties(x.device)
    tokens, splits = tiling(m, rows, depth, processors)
    out = x.new_empty((m, rows))
    partial = x.new_empty((splits, m, rows), dtype=torch.float32) if splits > 1 else None
    _KERNELS.launch(
        f"{name}_{_NAMES[x.dtype]}_{tokens}",
        (-(-m // tokens), -(-rows // _ROWS), splits),
        _THREADS,
        (
            x,
            weight.packed,
            weight.absmax,
            weight.nested_absmax,
            weight.offset,
            bias,
            None if low is None else _aligned(low),
            None if adapter is None else _aligned(adapter),
            out,
            partial,
            m,
            rows,
            depth,
            rank,
            -(-depth // _STEP // splits),
        ),
        device=x.device,
        shared=stages_bytes(capability, tokens),
    )
    if partial is not None:
        _KERNELS.launch(
            f"nf4_portable_add_{_NAMES[x.dtype]}",
            -(-m * rows // (4 * _THREADS)),
            _THREADS,
            (partial, bias, out, m, rows, splits),
            device=x.device,
        )
    return out


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its address is no multiple of 16."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@lru_cache(maxsize=64)
def _properties(device: torch.device) -> tuple[int, tuple[int, int]]:  # needs a GPU
    """A GPU's multiprocessors and compute capability."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def stages_bytes(capability: tuple[int, int], tokens: int) -> int:
    """Shared memory that a block's stages take, as portable.cu decides when it is compiled.

    Args:
        capability: the GPU's compute capability.
        tokens: rows of x per block.

    Returns:
        Bytes of dynamic shared memory.

    Example:
        >>> stages_bytes((8, 0), 128), stages_bytes((8, 6), 128), stages_bytes((8, 6), 32)
        (65536, 45056, 28672)
    """
    few, many = _LARGE_STAGES_KIB if capability in _LARGE else _SMALL_STAGES_KIB
    return (few if tokens < 128 else many) * 1024
