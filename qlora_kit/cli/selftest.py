"""A self-test of a few milliseconds: answers that are known, and float64 arithmetic.

Not a replacement for the tests. It finds a broken build, a wrong driver or a
kernel that miscompiles on one GPU, on the machine where it happens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qlora_kit.ops.backend import force_backend
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
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
    """Compare one backend of one op with exact arithmetic.

    Args:
        op: the op's name.
        backend: an available backend.

    Yields:
        What was compared, its largest error relative to the largest value, and the bound.

    Raises:
        KeyError: the op has no self-test.

    Example:
        >>> all(error <= bound for _, error, bound in op_errors("nf4_dequantize", "reference"))
        True
    """
    with force_backend(backend):
        yield from OP_TESTS[op](torch.device("cuda" if backend == "cuda" else "cpu"))


def _dequantize_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Decoded weights equal the codec's, bit for bit."""
    weight = NF4Weight.quantize(_random(48, 320))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoded = nf4_dequantize(weight.to(device), dtype).cpu()
        name = str(dtype).removeprefix("torch.")
        yield f"{name}, bit for bit", _error(decoded, weight.dequantize(dtype).double()), 0.0


def _linear_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Forward and backward, LoRA included, at few and at many rows."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = NF4Weight.quantize(_random(64, 128)).to(device)
    a, b = (_random(*shape).to(device, dtype) for shape in ((4, 128), (64, 4)))
    exact = weight.dequantize(dtype).double() + 0.5 * b.double() @ a.double()
    # roundings to the working precision (weight, low-rank product, result), and 128 float32 sums
    bound = 4 * torch.finfo(dtype).eps + 128 * torch.finfo(torch.float32).eps
    for rows in (1, 7, 300):
        x = _random(rows, 128).to(device, dtype).requires_grad_()
        dy = _random(rows, 64).to(device, dtype)
        y = nf4_linear(
            x,
            weight,
            lora_a=a.clone().requires_grad_(),
            lora_b=b.clone().requires_grad_(),
            scale=0.5,
        )
        y.backward(dy)
        assert x.grad is not None
        yield f"forward, {rows} rows", _error(y, x.detach().double() @ exact.T), bound
        yield f"backward, {rows} rows", _error(x.grad, dy.double() @ exact), bound


OP_TESTS = {"nf4_dequantize": _dequantize_errors, "nf4_linear": _linear_errors}
"""Op to its self-test; a test checks that every op has one."""


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact).abs().max() / exact.abs().max())
