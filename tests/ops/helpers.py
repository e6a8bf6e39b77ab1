"""Cases of nf4_linear, their truth in float64, and how far from it a result may lie.

The truth is computed from the operands as the op sees them: x, A, B and the bias
rounded to the compute dtype, the weight decoded to it. What is left are the op's
own roundings, and the bounds add them up. With u the unit roundoff of the dtype
(2**-8 for bfloat16, 2**-11 for float16), y = x·Wᵀ + xa·Bᵀ + bias and xa = s·x·Aᵀ:

- y is rounded once: u·|y|.
- xa is rounded once before it meets B: u·|xa|, through B: u·|xa|·|B|ᵀ.
- A strategy may write xa·Bᵀ + bias first, rounded, and add the large product to it:
  u·|xa·Bᵀ + bias|.
- Sums run in float32. Their error grows as the square root of the number of terms
  (Higham and Mary, doi:10.1137/18M1226312), by Cauchy and Schwarz at most
  2**-23·√K·‖x_i‖·‖W_j‖: tensor cores truncate, so a step is 2**-23 and not 2**-24.
- float16 ends at 2**-14; below, a rounding costs up to 2**-25 whatever the value.

Added up per element, that bound holds for every element. Their terms of second
order are covered by a factor 1.01. For the Frobenius norm the roundings count as
independent, so that squares are added: errors then average out, and a result that
is wrong by a little everywhere shows. dX is the same with W, B and A taken the
other way round; dA and dB are products of a rounded factor with an exact one.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qlora_kit.quant.weight import NF4Weight

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Unit roundoff: the largest relative error of one rounding."""
STEP = 2.0**-23
SECOND_ORDER = 1.01
SCALE = 0.5


@dataclass(frozen=True)
class Options:
    """What a case has beside its shape."""

    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True
    nested: bool = True
    block_size: int = 64

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        flags = f"{'-bias' if self.bias else ''}{'-nested' if self.nested else '-plain'}"
        return f"r{self.rank}-{dtype}{flags}-b{self.block_size}"


def random_weight(n, k, options, generator):
    """An NF4 weight of random codes and scales, as likely ones as a quantizer's, but at once."""
    device = generator.device
    blocks = -(-n * k // options.block_size)
    groups = -(-blocks // 256)

    def integers(*shape):
        return torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)

    def spread(count):
        return torch.rand(count, generator=generator, device=device) + 0.5

    absmax, nested, offset = integers(blocks), spread(groups) / k**0.5, None
    if options.nested:
        offset = torch.tensor(2.5 / k**0.5, device=device)
    else:
        absmax, nested = 2.5 * spread(blocks) / k**0.5, None
    return NF4Weight(
        packed=integers((n * k + 1) // 2, 1),
        absmax=absmax,
        nested_absmax=nested,
        offset=offset,
        shape=(n, k),
        block_size=options.block_size,
        dtype=options.dtype,
    )


@dataclass
class Case:
    """Operands of one call: leaves that want gradients, and the gradient of y."""

    m: int
    n: int
    k: int
    options: Options
    weight: NF4Weight
    x: torch.Tensor
    a: torch.Tensor | None
    b: torch.Tensor | None
    bias: torch.Tensor | None
    dy: torch.Tensor

    def __str__(self):
        return f"M {self.m}, N {self.n}, K {self.k}, {self.options}"

    def leaves(self):
        """The tensors present that want a gradient, by name."""
        named = {"dx": self.x, "da": self.a, "db": self.b, "dbias": self.bias}
        return {name: leaf for name, leaf in named.items() if leaf is not None}


def make_case(m, n, k, options=None, device="cpu", weight=None):
    """Random operands; A and B are float32 masters whose values the compute dtype holds."""
    options = options or Options()
    generator = torch.Generator(device).manual_seed(m * 1_000_003 + n * 1009 + k)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(options.dtype)

    weight = weight or random_weight(n, k, options, generator)
    x, dy = normal(m, k), normal(m, n)
    a = b = bias = None
    if options.rank:
        a = (normal(options.rank, k) / k**0.5).float().requires_grad_()
        b = (normal(n, options.rank) / options.rank**0.5).float().requires_grad_()
    if options.bias:
        bias = normal(n).requires_grad_()
    return Case(m, n, k, options, weight, x.requires_grad_(), a, b, bias, dy)


@dataclass
class Expected:
    """A true result and the two bounds."""

    value: torch.Tensor
    """float64."""
    elementwise: torch.Tensor
    """float64, the largest error of each element."""
    frobenius: float
    """The largest norm of the error."""

    def worst(self, got):
        """The error in units of its bound, the larger of the two; NaN where the result has one."""
        if got.shape != self.value.shape:
            return float("inf")
        if got.numel() == 0:
            return 0.0
        error = got.double() - self.value
        ratio = (error.abs() / self.elementwise).amax().item()
        norm = (error.norm() / self.frobenius).item()
        return ratio if not ratio <= norm else norm

    def check(self, got, what):
        """Fail, and say where, when a result is out of bounds."""
        assert got.shape == self.value.shape, f"{what}: {tuple(got.shape)}"
        worst = self.worst(got)
        assert worst <= 1, f"{what}: {worst:.3g} times the bound\n{self.report(got)}"

    def report(self, got):
        """Which elements are out of bounds: how many, in which rows and columns."""
        results = got.double(), self.value, self.elementwise
        got, value, bound = (t.reshape(-1, t.shape[-1]) for t in results)
        bad = ~((got - value).abs() <= bound)
        count = int(bad.sum())
        if not count:
            return f"each element is in bounds, the norm is not: {(got - value).norm():.4g}"
        rows, columns = bad.nonzero(as_tuple=True)
        shown = ", ".join(
            f"[{i},{j}] {got[i, j]:.6g} for {value[i, j]:.6g} ± {bound[i, j]:.2g}"
            for i, j in zip(rows[:4].tolist(), columns[:4].tolist(), strict=True)
        )
        return (
            f"{count} of {bad.numel()} elements ({int(got.isnan().sum())} NaN), "
            f"rows {_some(rows)}, columns {_some(columns)}: {shown}"
        )


def _some(indices):
    """How many different indices, the first and the last ones."""
    unique = indices.unique().tolist()
    text = unique if len(unique) <= 8 else [*unique[:4], "...", *unique[-4:]]
    return f"{len(unique)}: {' '.join(map(str, text))}"


def _tiny(dtype):
    return torch.finfo(dtype).smallest_normal * UNIT[dtype]


def _rows(matrix):
    return matrix.norm(dim=1, keepdim=True)


@dataclass
class _Small:
    """A rounded low-rank factor, (M, r), and its error."""

    value: torch.Tensor
    error: torch.Tensor

    @classmethod
    def of(cls, left, right, dtype):
        """SCALE·left·rightᵀ, of (M, K) and (r, K)."""
        value = SCALE * left @ right.T
        sums = STEP * left.shape[1] ** 0.5 * SCALE * _rows(left) * _rows(right).T
        return cls(value, UNIT[dtype] * value.abs() + sums + _tiny(dtype))


def _large_product(left, weight, small, factor, bias, dtype):
    """left·weightᵀ + small·factorᵀ + bias, of (M, K), (N, K), (M, r), (N, r) and (N,)."""
    unit, depth = UNIT[dtype], left.shape[1]
    value = left @ weight.T
    bound = STEP * depth**0.5 * _rows(left) * _rows(weight).T + _tiny(dtype)
    squares = (STEP * left.norm() * weight.norm()) ** 2
    first = torch.zeros_like(value)
    if small is not None:
        first += small.value @ factor.T
        bound += small.error @ factor.abs().T
        bound += STEP * factor.shape[1] ** 0.5 * _rows(small.value) * _rows(factor).T
        squares += (small.error.norm(dim=0) * factor.norm(dim=0)).square().sum()
    if bias is not None:
        first += bias
    if small is not None or bias is not None:
        value += first
        bound += unit * first.abs()
        squares += (unit * first.norm()) ** 2
    bound += unit * value.abs()
    squares += (unit * value.norm()) ** 2
    return _expected(value, bound, squares, dtype)


def _small_gradient(left, right, dtype):
    """leftᵀ·right of (M, p) and (M, q), one of them a rounded factor."""
    swap = isinstance(right, _Small)
    rounded, exact = (right, left) if swap else (left, right)
    value = rounded.value.T @ exact
    sums = STEP * exact.shape[0] ** 0.5 * rounded.value.norm(dim=0)[:, None] * exact.norm(dim=0)
    bound = UNIT[dtype] * value.abs() + rounded.error.T @ exact.abs() + sums + _tiny(dtype)
    squares = (UNIT[dtype] * value.norm()) ** 2 + (STEP * rounded.value.norm() * exact.norm()) ** 2
    squares += (_rows(rounded.error) * _rows(exact)).square().sum()
    if swap:
        value, bound = value.T, bound.T
    return _expected(value, bound, squares, dtype)


def _expected(value, bound, squares, dtype):
    norm = SECOND_ORDER * squares.item() ** 0.5 + _tiny(dtype) * value.numel() ** 0.5
    return Expected(value, SECOND_ORDER * bound, norm)


@dataclass
class Truth:
    """What each result of a call should be, and the factors a strategy is given."""

    results: dict[str, Expected] = field(default_factory=dict)
    """By name: y, dx, da, db, dbias; those the case has."""

    def check(self, name, got, what):
        """Hold one result against its bounds."""
        self.results[name].check(got, f"{name} of {what}")


def truth(case):
    """Output and gradients in float64."""
    dtype = case.options.dtype
    x, dy = case.x.detach().double(), case.dy.double()
    weight = case.weight.dequantize(dtype).double()
    bias = None if case.bias is None else case.bias.detach().double()
    a = b = xa = dyb = None
    if case.a is not None:
        a, b = case.a.detach().double(), case.b.detach().double()
        xa, dyb = _Small.of(x, a, dtype), _Small.of(dy, b.T, dtype)
    results = {
        "y": _large_product(x, weight, xa, b, bias, dtype),
        "dx": _large_product(dy, weight.T, dyb, None if a is None else a.T, None, dtype),
    }
    if a is not None:
        results["da"] = _small_gradient(dyb, x, dtype)
        results["db"] = _small_gradient(dy, xa, dtype)
    if bias is not None:
        value = dy.sum(dim=0)
        bound = UNIT[dtype] * value.abs() + STEP * case.m * dy.norm(dim=0)
        results["dbias"] = _expected(value, bound, bound.square().sum(), dtype)
    return Truth(results)


@contextmanager
def float32_sums():
    """The bounds are those of float32 sums; by default cuBLAS may add parts in 16 bits."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def poison(device, *shapes, dtype=torch.bfloat16):
    """Fill the memory the caching allocator will hand out next with NaN, in any float dtype.

    Blocks as large as the coming results are made first; then every free block of the
    current stream is taken, filled and given back.
    """
    if torch.device(device).type != "cuda":
        return
    if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > 12 << 30:
        torch.cuda.empty_cache()
    held = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes for _ in "ab"]
    del held
    here = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream, (0, 0)
    held = []
    for segment in torch.cuda.memory_snapshot():
        pool = tuple(segment.get("segment_pool_id", (0, 0)))  # others belong to CUDA graphs
        if (segment["device"], segment["stream"], pool) != here:
            continue
        sizes = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        held += [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]
    del held
