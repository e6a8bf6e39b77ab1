"""A self-test of a few milliseconds: answers that are known, and float64 arithmetic.

Not a replacement for the tests. It finds a broken build, a wrong driver or a
kernel that miscompiles on one GPU, on the machine where it happens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_kit.ops.backend import force_backend
from qlora_kit.ops.column_products.op import column_products
from qlora_kit.ops.cross_entropy.op import cross_entropy, cross_entropy_
from qlora_kit.ops.gated_activation.op import (
    KINDS,
    gated_activation,
    gated_activation_backward,
)
from qlora_kit.ops.gather_rows.op import gather_rows
from qlora_kit.ops.low_rank_gradients.op import low_rank_gradients
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.ops.nf4_linear import cuda as nf4_linear_cuda
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.ops.nf4_quantize.op import nf4_quantize, nf4_quantize_absmax
from qlora_kit.ops.nf4_scales.op import stretched_weight
from qlora_kit.ops.rms_norm.op import rms_norm, rms_norm_backward
from qlora_kit.ops.rotary.op import rotary_
from qlora_kit.quant.double_quant import quantize_absmax
from qlora_kit.quant.nf4 import NF4_VALUES, dequantize_nf4, quantize_nf4
from qlora_kit.quant.weight import NF4Weight

_CUDA = torch.device("cuda")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    for dtype in _DTYPES:
        decoded = nf4_dequantize(weight.to(device), dtype).cpu()
        name = str(dtype).removeprefix("torch.")
        yield f"{name}, bit for bit", _error(decoded, weight.dequantize(dtype).double()), 0.0
        right = _random(30, 16).to(dtype)
        for transposed, columns in ((False, None), (False, right), (True, None), (True, right)):
            part = nf4_dequantize(
                weight.to(device),
                dtype,
                rows=(5, 35),
                transposed=transposed,
                columns=None if columns is None else columns.to(device),
            )
            exact = weight.dequantize(dtype)[5:35]
            exact = exact if columns is None else torch.cat((exact, columns), dim=1)
            exact = exact.T if transposed else exact
            what = "transposed" if transposed else "rows"
            what += " with columns" if columns is not None else ""
            yield f"{name}, {what}, bit for bit", _error(part.cpu(), exact.double()), 0.0


def _quantize_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Codes and scales equal the codec's on the same device, bit for bit."""
    for dtype in _DTYPES:
        source = _random(97, 331).to(device, dtype)  # the last block is short
        source[3:7] = 0
        for block_size in (64, 4096):
            found = nf4_quantize(source, block_size=block_size)
            wanted = quantize_nf4(source, block_size=block_size)
            name = f"{str(dtype).removeprefix('torch.')}, blocks of {block_size}, bit for bit"
            yield name, _total(found, wanted), 0.0
    scales = _random(3000).abs().to(device)
    error = _total(nf4_quantize_absmax(scales), quantize_absmax(scales))
    yield "scales in 8 bits, bit for bit", error, 0.0


def strategies() -> list[str]:
    """The strategies of `nf4_linear` on CUDA.

    Returns:
        Their names.

    Example:
        >>> "dense" in strategies()
        True
    """
    return list(nf4_linear_cuda.STRATEGIES)


def strategy_errors(
    strategy: str, device: torch.device = _CUDA
) -> Iterator[tuple[str, float, float]]:
    """Compare both products of one strategy of `nf4_linear` with float64.

    Args:
        strategy: a member of `strategies()`.
        device: where to.

    Yields:
        What was compared, its largest error relative to the largest value, and the bound;
        nothing where the strategy does not serve this GPU.
    """
    module = nf4_linear_cuda.STRATEGIES[strategy]
    n, k, rank = 384, 512, 16
    weight = NF4Weight.quantize(_random(n, k)).to(device)
    for dtype in (torch.bfloat16, torch.float16):
        decoded = weight.dequantize(dtype).double()
        a, b, bias = (_random(*shape).to(device, dtype) for shape in ((rank, k), (n, rank), (n,)))
        bound = 4 * torch.finfo(dtype).eps + (k + rank) * torch.finfo(torch.float32).eps
        for rows in (1, 7, 16, 64, 129, 300):
            x, dy, small = (_random(rows, size).to(device, dtype) for size in (k, n, rank))
            what = f"{str(dtype).removeprefix('torch.')}, {rows} rows"
            if hasattr(module, "multiply") and module.serves(x, weight):
                y = module.multiply(x, weight, bias, small, b)
                exact = x.double() @ decoded.T + small.double() @ b.double().T + bias.double()
                yield f"forward, {what}", _error(y, exact), bound
            if hasattr(module, "multiply_transposed") and module.serves(dy, weight):
                dx = module.multiply_transposed(dy, weight, small, a)
                exact = dy.double() @ decoded + small.double() @ a.double()
                yield f"transposed, {what}", _error(dx, exact), bound


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


def _low_rank_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Two linears side by side, dY·B written beside dY: rows for one pass, and for two products."""
    parts, n, r = [(1032, 16), (1112, 24)], 1112, 24
    for dtype in (torch.bfloat16, torch.float16):
        b = _random(n, r)
        b[:1032, 16:], b[1032:, :16] = 0, 0
        errors: dict[str, list[float]] = {"dY B": [], "dB": []}
        for rows in (1100, 7):
            wide, xa = (_random(rows, size).to(device, dtype) for size in (n + r, r))
            dy, factor = wide[:, :n], b.to(device, dtype)
            exact = dy.double() @ factor.double()
            sums = dy.double().T @ xa.double()
            wanted = torch.zeros_like(sums[:, :16])
            wanted[:1032], wanted[1032:, :8] = sums[:1032, :16], sums[1032:, 16:]
            dyb, d_b = low_rank_gradients(dy, factor, xa, parts=parts, out=wide[:, n:])
            errors["dY B"].append(_error(dyb, exact))
            errors["dB"].append(_error(d_b, wanted))
        # a rounding of dY·B, in two products perhaps of its parts too; dB stays float32
        sums_bound = 2 * max(1100, n) ** 0.5 * torch.finfo(torch.float32).eps
        yield from _worst({"dY B": errors["dY B"]}, dtype, 2 * torch.finfo(dtype).eps + sums_bound)
        yield from _worst({"dB": errors["dB"]}, dtype, sums_bound)


def _norm_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Rows for a warp, for a block, and of no whole pieces; the gradient beside the result."""
    sizes = (128, 4096, 515)
    for dtype in _DTYPES:
        errors: dict[str, list[float]] = {"forward": [], "backward": [], "again": []}
        for h in sizes:
            x, dy, residual = (_random(9, h + 8 * i).to(device, dtype)[:, :h] for i in range(3))
            weight = _random(h).to(device)
            dx, again = torch.empty_like(x), torch.empty_like(x)
            y = rms_norm(x, weight, 1e-5)
            rms_norm_backward(dy, x, weight, 1e-5, residual=residual, dx=dx, normalized=again)
            with force_backend("reference"):
                exact = rms_norm(x.double(), weight, 1e-5)
                gradient = rms_norm_backward(
                    dy.double(), x.double(), weight, 1e-5, residual=residual.double()
                )
            errors["forward"].append(_error(y, exact))
            errors["backward"].append(_error(dx, gradient))
            errors["again"].append(_error(again, exact))
        # one rounding of the result, and float32 sums
        bound = torch.finfo(dtype).eps + 2 * max(sizes) ** 0.5 * torch.finfo(torch.float32).eps
        yield from _worst(errors, dtype, bound)


def _rotary_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Whole heads and a part of each, both ways, in a part of a wider buffer."""
    for dtype in _DTYPES:
        errors: dict[str, list[float]] = {"forward": [], "backward": []}
        for turned in (64, 10):
            angle = _random(5, turned // 2).repeat(1, 2).to(device)
            cos, sin = angle.cos(), angle.sin()
            for name, found in errors.items():
                inverse = name == "backward"
                heads = _random(10, 640).to(device, dtype).view(10, 10, 64)[:, 1:9]
                with force_backend("reference"):
                    exact = rotary_(heads.double(), cos, sin, inverse=inverse)
                found.append(_error(rotary_(heads, cos, sin, inverse=inverse), exact))
        bound = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
        yield from _worst(errors, dtype, bound)


def _gated_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Each activation function, the gradient over its input, and the result beside it."""
    for dtype in _DTYPES:
        for kind in KINDS:
            errors: dict[str, list[float]] = {"forward": [], "backward": [], "again": []}
            for f in (640, 33):
                gate_up, dact = (_random(5, size).to(device, dtype) for size in (2 * f, f))
                with force_backend("reference"):
                    exact = gated_activation(gate_up.double(), kind)
                    gradient = gated_activation_backward(dact.double(), gate_up.double(), kind)
                errors["forward"].append(_error(gated_activation(gate_up, kind), exact))
                gated_activation_backward(dact, gate_up, kind, d_gate_up=gate_up, act=dact)
                errors["backward"].append(_error(gate_up, gradient))
                errors["again"].append(_error(dact, exact))
            bound = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
            yield from _worst(errors, dtype, bound, f" {kind}")


def _cross_entropy_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Rows that fit on a processor and one that does not, of any alignment; an ignored row."""
    rules: tuple[dict[str, Any], ...] = ({"scale": 0.5}, {"softcap": 5.0, "label_smoothing": 0.1})
    for dtype in _DTYPES:
        of_losses: dict[str, list[float]] = {"losses": []}
        of_gradient: dict[str, list[float]] = {"gradient": []}
        for v in (515, 131_072):
            for rule in rules:
                logits = (4 * _random(3, v + 3)).to(device, dtype)[:, :v]
                targets = torch.tensor([v - 1, -100, 7], device=device)
                factor = torch.tensor(2.0, device=device)
                options = {**rule, "ignore_index": -100}
                with force_backend("reference"):
                    exact = logits.double()
                    wanted = cross_entropy_(exact, targets, factor=factor.double(), **options)
                losses = cross_entropy(logits, targets, **options)
                again = cross_entropy_(logits, targets, factor=factor, **options)
                of_losses["losses"].append(_total((losses, again), (wanted, wanted)))
                of_gradient["gradient"].append(_error(logits, exact))
        # float32 sums, powers and products of logits up to 16; one rounding of the gradient
        slack = 64 * torch.finfo(torch.float32).eps
        yield from _worst(of_losses, dtype, slack)
        yield from _worst(of_gradient, dtype, torch.finfo(dtype).eps + slack)


def _worst(
    errors: dict[str, list[float]], dtype: torch.dtype, bound: float, kind: str = ""
) -> Iterator[tuple[str, float, float]]:
    """The largest error of each thing that was compared; a NaN is the largest."""
    for name, found in errors.items():
        what = f"{str(dtype).removeprefix('torch.')}{kind}, {name}"
        yield what, max(found, key=lambda error: (error != error, error)), bound


def _column_products_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Whole pieces and single values, one strip of rows and several."""
    for dtype in _DTYPES:
        errors: dict[str, list[float]] = {"sums": []}
        for rows, n in ((700, 640), (40, 33)):
            a, b = (_random(rows + i, n).to(device, dtype)[:rows] for i in range(2))
            exact = (a.double() * b.double()).sum(0)
            errors["sums"].append(_error(column_products(a, b), exact))
        yield from _worst(errors, dtype, 700 * torch.finfo(torch.float32).eps)


def _scales_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Stretched scales, with and without double quantization, bit for bit."""
    factors = 1.0 + 0.1 * _random(48)
    for nested in (True, False):
        weight = NF4Weight.quantize(_random(48, 320), double_quant=nested)
        exact = weight.scales().view(48, -1) * factors[:, None]
        found = stretched_weight(weight.to(device), factors.to(device)).absmax.cpu()
        name = "nested" if nested else "plain"
        yield f"{name}, bit for bit", _error(found, exact.view(-1).double()), 0.0


def _gather_errors(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Rows equal the table's, bit for bit, from the device and from page-locked memory."""
    table = _random(50, 200)
    ids = torch.arange(70).flip(0) % 50
    host = table.pin_memory() if device.type == "cuda" else table
    for name, place in (("same device", table.to(device)), ("host memory", host)):
        found = gather_rows(place, ids.to(device)).cpu()
        yield f"{name}, bit for bit", _error(found, table[ids].double()), 0.0


OP_TESTS = {
    "column_products": _column_products_errors,
    "cross_entropy": _cross_entropy_errors,
    "gated_activation": _gated_errors,
    "gather_rows": _gather_errors,
    "low_rank_gradients": _low_rank_errors,
    "nf4_dequantize": _dequantize_errors,
    "nf4_linear": _linear_errors,
    "nf4_quantize": _quantize_errors,
    "nf4_scales": _scales_errors,
    "rms_norm": _norm_errors,
    "rotary": _rotary_errors,
}
"""Op to its self-test; a test checks that every op has one."""


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact).abs().max() / exact.abs().max())


def _total(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The errors of several tensors, added up: a NaN stays one."""
    pairs = zip(found, wanted, strict=True)
    return sum(_error(value, exact.double()) for value, exact in pairs)
