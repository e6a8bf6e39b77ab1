"""A self-test of a few milliseconds: answers that are known, and float64 arithmetic.

Not a replacement for the tests. It finds a broken build, a wrong driver or a
kernel that miscompiles on one GPU, on the machine where it happens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qlora_kit.ops.backend import force_backend
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.quant.nf4 import NF4_VALUES, dequantize_nf4, quantize_nf4
from qlora_kit.quant.weight import NF4Weight


def codec_errors() -> list[str]:
    """Check the NF4 codec against answers that follow from its definition.

    Returns:
        What is wrong; empty when all is well.

    Example:
        >>> codec_errors()
        []
    """
    wrong = []
    table = torch.tensor(NF4_VALUES)
    packed, absmax = quantize_nf4(3.0 * table.repeat(4), block_size=64)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()
    if codes.tolist() != list(range(16)) * 4:
        wrong.append("codes of the table's own values")
    if absmax.tolist() != [3.0]:
        wrong.append("scale of a block")
    values = dequantize_nf4(packed, absmax, (64,), block_size=64, dtype=torch.float32)
    if not torch.equal(values, 3.0 * table.repeat(4)):
        wrong.append("decoded values")
    zero = NF4Weight.quantize(torch.zeros(2, 64)).dequantize()
    if zero.abs().max() > 1e-30:
        wrong.append("a block of zeros")
    return wrong


def op_errors(op: str, backend: str) -> Iterator[tuple[str, float, float]]:
    """Compare one backend of one op with float64 arithmetic.

    Args:
        op: the op's name.
        backend: an available backend.

    Yields:
        What was compared, its largest error relative to the largest value, and the bound.
    """
    if op != "nf4_linear":
        return  # each op brings its own comparison here
    device = "cuda" if backend == "cuda" else "cpu"
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    x, dy = random(7, 128).requires_grad_(), random(7, 64)
    a, b = random(4, 128).requires_grad_(), random(64, 4).requires_grad_()
    weight = NF4Weight.quantize(random(64, 128).float().cpu()).to(torch.device(device))
    with force_backend(backend):
        y = nf4_linear(x, weight, lora_a=a, lora_b=b, scale=0.5)
        y.backward(dy)
    exact = weight.dequantize(dtype).double() + 0.5 * b.detach().double() @ a.detach().double()
    assert x.grad is not None
    # roundings to the working precision (weight, low-rank product, result), and 128 float32 sums
    bound = 4 * torch.finfo(dtype).eps + 128 * torch.finfo(torch.float32).eps
    yield "forward", _error(y, x.detach().double() @ exact.T), bound
    yield "backward", _error(x.grad, dy.double() @ exact), bound


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact).abs().max() / exact.abs().max())
