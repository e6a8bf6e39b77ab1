"""What one op of a traced step costs: its kind, its arithmetic, its traffic, its workspace.

Traffic counts every tensor once, read or written, as a kernel that does its job in one pass
moves it. A workspace is memory that a kernel takes for the time of its run, beside inputs
and results: ours by their code, cuDNN's and FlashAttention's by what was measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from qlora_kit.ops.attention import op as _attention  # noqa: F401  registers the op, as below
from qlora_kit.ops.low_rank_gradients.cuda import FEWEST_VALUES, SHAPES, kernel_rank
from qlora_kit.ops.nf4_dequantize import op as _nf4_dequantize  # noqa: F401
from qlora_kit.ops.nf4_linear import op as _nf4_linear  # noqa: F401
from qlora_kit.ops.nf4_linear.cuda import FUSED_ROWS
from qlora_kit.ops.nf4_linear.hopper_tiling import H100, sums_bytes, tiling
from qlora_kit.plan.gpus import Gpu
from qlora_kit.plan.host import ASSUMED_US


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call."""

    kind: str
    """`product`, `attention`, `decode` or `elementwise`; `nothing` for views and allocations."""
    seconds: float = 0.0
    """On the GPU, by itself."""
    workspace: int = 0
    """Bytes, while it runs."""


NOTHING = Cost("nothing")

_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
}
_ADDING = {torch.ops.aten.addmm, torch.ops.aten.baddbmm}
_ALLOCATIONS = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
    torch.ops.aten.detach,
    torch.ops.aten._unsafe_view,
}
_FILLING = 200
"""Values of a dimension that a product's pipelines cost, measured in what they could have done."""
_LAUNCH_S = 2.0e-6
"""Between two kernels of a full queue, and their start and end."""


_TORCH_LAUNCH_S, _OUR_LAUNCH_S, _DECODE_LAUNCH_S = 42e-6, 115e-6, 200e-6
"""Python's time per op, what leads to it included: torch's, ours, decoding a weight. Fitted to the
steps without a graph in benchmarks/results/memory and rounded with an eye on those in
benchmarks/results/plan, eight that are off by 16% in the median: a slow host, on which the same
step took a quarter more or less from one process to the next. They are for a host of `ASSUMED_US`
per small op; others' are in proportion."""


def launch_seconds(op: OpOverload, cost: Cost, gpu: Gpu) -> float:
    """What one call takes of the host's time.

    Args:
        op: that was called.
        cost: of the call.
        gpu: it would run on, with its host's figure.

    Returns:
        Seconds.

    Example:
        >>> from qlora_kit.plan.gpus import find_gpu
        >>> launch_seconds(torch.ops.aten.mm.default, Cost("product"), find_gpu("h100"))
        4.2e-05
    """
    if cost.kind == "nothing":
        return 0.0
    seconds = _OUR_LAUNCH_S if op.namespace == "qlora_kit" else _TORCH_LAUNCH_S
    seconds = _DECODE_LAUNCH_S if cost.kind == "decode" else seconds
    return seconds * gpu.host_us / ASSUMED_US


def cost_of(op: OpOverload, inputs: Any, result: Any, gpu: Gpu) -> Cost:
    """Cost of one call.

    Args:
        op: that was called.
        inputs: its arguments, in any structure.
        result: what it returned.
        gpu: it would run on.

    Returns:
        The cost; views and allocations cost nothing.

    Example:
        >>> from qlora_kit.plan.gpus import find_gpu
        >>> x = torch.empty(8192, 8192, dtype=torch.bfloat16, device="meta")
        >>> cost_of(torch.ops.aten.mm.default, (x, x), x, find_gpu("h100")).kind
        'product'
    """
    special, free = _known(op)
    if special is not None:
        return special(inputs, gpu)
    if free:
        return NOTHING
    tensors = tensors_of((inputs, result))
    moved = sum({id(t): _bytes(t) for t in tensors}.values())
    packet = op.overloadpacket
    if packet in _PRODUCTS:
        flops, narrow = _product_flops(packet, inputs)
        return _product(flops, moved, tensors[0].dtype, gpu, narrow)
    return Cost("elementwise", moved / gpu.bandwidth + _LAUNCH_S)


@cache
def _known(op: OpOverload) -> tuple[Callable[[Any, Gpu], Cost] | None, bool]:
    """An op's own function, if it has one, and whether it is a view or an allocation."""
    return _SPECIAL.get(op.name()), op.overloadpacket in _ALLOCATIONS or op.is_view


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor among an op's arguments or results, in order.

    Ops take and return tuples, lists and dictionaries alone, so this is the part of torch's
    `tree_leaves` that a trace needs, at a fraction of its time.

    Args:
        value: a tensor, anything else, or a structure of both.

    Returns:
        The tensors, as often as they are in it.

    Example:
        >>> x, y = torch.zeros(2), torch.ones(2)
        >>> [t.tolist() for t in tensors_of((x, [1, y, None], {"out": x}))]
        [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    found: list[Tensor] = []
    for one in value:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, tuple | list | dict):
            found += tensors_of(one)
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _product(flops: int, moved: int, dtype: torch.dtype, gpu: Gpu, narrow: int = 4096) -> Cost:
    """A product whose narrowest large dimension is so wide: tiles are filled and emptied."""
    rate = gpu.matrix_flops / (16 if dtype == torch.float32 else 1)  # TF32 is off
    rate *= narrow / (narrow + _FILLING)
    return Cost("product", max(flops / rate, moved / gpu.bandwidth) + _LAUNCH_S)


def _product_flops(packet: Any, inputs: Any) -> tuple[int, int]:
    """Twice the multiply-adds, and the smaller of contraction and width."""
    args = _arguments(inputs)
    left, right = args[1:3] if packet in _ADDING else args[:2]
    width = int(right.shape[-1])
    return 2 * prod(left.shape) * width, min(width, int(left.shape[-1]))


def _arguments(inputs: Any) -> Sequence[Any]:
    args, _ = inputs
    return args


def _attention_flops(q: Tensor, window: int | None, starts: Tensor | None, longest: int) -> float:
    """Of one product of queries and keys, what causality leaves of it."""
    b, t, heads, dim = q.shape
    rows = t if starts is None else min(t, longest)
    reach = rows if window is None else min(rows, window)
    return 2.0 * b * t * heads * dim * (reach - reach * reach / (2 * rows))


def _attention_forward(inputs: Any, gpu: Gpu) -> Cost:
    q, _k, _v, _scale, window, _softcap, _same, starts, longest = _arguments(inputs)
    rows = q.shape[1] if starts is None else min(q.shape[1], longest)
    flops = 2 * _attention_flops(q, window, starts, longest)
    return Cost("attention", flops / gpu.forward.rate(rows, q.shape[-1]) + _LAUNCH_S)


def _attention_backward(inputs: Any, gpu: Gpu) -> Cost:
    dout, q, k, _v, _o, _l, _scale, window, _softcap, same, starts, longest = _arguments(inputs)
    rows = q.shape[1] if starts is None else min(q.shape[1], longest)
    flops = 5 * _attention_flops(q, window, starts, longest)
    cudnn = gpu.uses_cudnn_attention and window is None and starts is None and not same
    b, t, heads, dim = q.shape
    if not cudnn:  # FlashAttention 2 rounds up
        t, dim = -(-t // 128) * 128, -(-dim // 32) * 32
    workspace = b * t * heads * (dim + 1) * 4  # the gradient of q in float32, a sum per query
    if k.shape[2] != heads:  # dK and dV, once per query head
        workspace += 2 * b * t * heads * dim * dout.element_size()
    return Cost("attention", flops / gpu.backward.rate(rows, q.shape[-1]) + _LAUNCH_S, workspace)


def _masked_flops(q: Tensor, k: Tensor) -> float:
    """Of one product of queries and keys where a mask is read: nothing is left out."""
    b, heads, t, dim = q.shape
    return 2.0 * b * heads * t * k.shape[2] * dim


def _masked_forward(inputs: Any, gpu: Gpu) -> Cost:
    q, k, *_ = _arguments(inputs)
    rate = gpu.forward.rate(q.shape[2], q.shape[-1])
    return Cost("attention", 2 * _masked_flops(q, k) / rate + _LAUNCH_S)


def _masked_backward(inputs: Any, gpu: Gpu) -> Cost:
    _dout, q, k, *_ = _arguments(inputs)
    rate = gpu.backward.rate(q.shape[2], q.shape[-1])
    return Cost("attention", 5 * _masked_flops(q, k) / rate + _LAUNCH_S)


def _decode(inputs: Any, gpu: Gpu) -> Cost:
    """One launch: codes and scales in, the matrix out."""
    packed, _columns, out = _arguments(inputs)
    return Cost("decode", (_bytes(packed) * 1.03 + _bytes(out)) / gpu.bandwidth + _LAUNCH_S)


def _whole_decode(inputs: Any, gpu: Gpu) -> Cost:
    packed, *_rest = _arguments(inputs)
    return Cost("decode", packed.numel() * 5.03 / gpu.bandwidth + _LAUNCH_S)


def _linear(inputs: Any, gpu: Gpu) -> Cost:
    """`nf4_linear`: decoded into a temporary, multiplied, LoRA as more of the contraction.

    As `dense` does it, a copy of x for LoRA included, which is what plans were measured with. On
    Hopper `ahead` makes no such copy, so that plans of a model's own layers are that much too high.
    """
    x, packed, _absmax, _nested, _offset, (n, k), _block, _bias, a, *_ = _arguments(inputs)
    rank = 0 if a is None else -(-a.shape[0] // 8) * 8
    return _linear_pass(x, packed, n, k, rank, gpu, beside=x.shape[0] * (k + rank) if rank else 0)


def _linear_backward(inputs: Any, gpu: Gpu) -> Cost:
    dy, _x, packed, _absmax, _nested, _offset, (n, k), _block, a, *rest = _arguments(inputs)
    need_dx = rest[-4]
    rank = 0 if a is None else -(-a.shape[0] // 8) * 8
    if not need_dx:
        return _product(4 * dy.shape[0] * rank * (n + k), _bytes(dy), dy.dtype, gpu)
    beside = dy.shape[0] * (n + rank) if rank else 0
    return _linear_pass(dy, packed, n, k, 2 * rank, gpu, beside=beside)


def _linear_pass(
    rows: Tensor, packed: Tensor, n: int, k: int, rank: int, gpu: Gpu, *, beside: int
) -> Cost:
    size = rows.element_size()
    m = rows.shape[0]
    decoded = (n + rank) * (k + rank) * size
    flops = 2 * m * (n * k + rank * (n + k))
    product = _product(flops, decoded, rows.dtype, gpu, min(n, k)).seconds
    decode = (_bytes(packed) + decoded) / gpu.bandwidth
    copies = 2 * beside * size / gpu.bandwidth
    seconds = product + decode + copies + 3 * _LAUNCH_S
    shared = _shared_sums(rows, n, k, rank, gpu)
    return Cost("product", seconds, max(decoded + beside * size, shared))


def _shared_sums(rows: Tensor, n: int, k: int, rank: int, gpu: Gpu) -> int:
    """Bytes in which clusters add up tiles that they share, where the fused product serves."""
    m, contraction = rows.shape
    if gpu.capability != (9, 0) or not 0 < m <= FUSED_ROWS or rows.element_size() != 2:
        return 0
    columns = n + k - contraction
    cut, _ = tiling(m, columns, contraction, H100, rank)
    return sums_bytes(cut, cut.shape.tiles_of(m, columns))


def _low_rank_gradients(inputs: Any, gpu: Gpu) -> Cost:
    """One pass over dY; partial sums in float32, as `low_rank_gradients/cuda.py` has them."""
    dy, b, xa, column_ends, rank_ends, out = _arguments(inputs)
    rank = kernel_rank(column_ends, rank_ends)
    (m, n), size = dy.shape, _bytes(dy) + 2 * _bytes(out) + _bytes(xa) + _bytes(b)
    seconds = size / gpu.bandwidth + 2 * _LAUNCH_S
    if dy.numel() < FEWEST_VALUES.get(rank, dy.numel() + 1):
        return Cost("elementwise", seconds)
    wide = SHAPES[rank][0].columns * SHAPES[rank][0].warps
    strips = -(-n // wide)
    return Cost("elementwise", seconds, 4 * rank * (strips * m + (strips + _BLOCKS) * wide))


_BLOCKS = 132
"""Blocks that one pass over dY is divided among: a large GPU's processors."""

_SPECIAL: dict[str, Callable[[Any, Gpu], Cost]] = {
    "qlora_kit::attention": _attention_forward,
    "qlora_kit::attention_backward": _attention_backward,
    "aten::_scaled_dot_product_efficient_attention": _masked_forward,
    "aten::_scaled_dot_product_efficient_attention_backward": _masked_backward,
    "qlora_kit::nf4_dequantize_into": _decode,
    "qlora_kit::nf4_dequantize": _whole_decode,
    "qlora_kit::nf4_linear": _linear,
    "qlora_kit::low_rank_gradients": _low_rank_gradients,
    "qlora_kit::nf4_linear_backward": _linear_backward,
}
