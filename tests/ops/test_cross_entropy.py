"""Every backend of cross_entropy against float64, in every layout; wrong answers do not pass.

What float32 arithmetic adds to the rounding of the gradient, in units of s = 2**-24, with R
the largest |logit| of a row, or the soft cap if that is larger. Exponents are differences of
logits, up to 2R: their rounding and that of the factor on them are 6R, tanh is good to 8 (so
16R for a value and for what it is compared with), and 2**x or exp to 4. A sum of V terms grows
to √V. Probabilities so have a relative error of e = 32R + √V + 32, and the losses the same,
absolute; the mean of V logits that label smoothing takes adds R·√V. The gradient
f·(p − wanted), f being factor · scale · slope, adds a few roundings of both terms, 16. Powers
below 2**-126 may be flushed.
"""

import pytest
import torch
import torch.nn.functional as F

from qlora_kit.core.errors import ShapeError, UserError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.cross_entropy import cuda
from qlora_kit.ops.cross_entropy.cuda import plan
from qlora_kit.ops.cross_entropy.op import cross_entropy, cross_entropy_
from tests.ops.rows import DTYPES, LAYOUTS, Buffer, S, Within, device_of, values

BACKENDS = available_backends("cross_entropy")
SHAPES = [(1, 1), (3, 7), (4, 8), (5, 64), (4, 515), (3, 4099), (3, 20_000)]
IGNORE = -100
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.25, "factor": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "cap": {"softcap": 5.0},
    "all": {"softcap": 6.0, "scale": 1.5, "label_smoothing": 0.2, "factor": 0.01},
}


def logits_of(raw, scale=1.0, softcap=None):
    z = raw * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class Case:
    """Logits in a dtype, and the truth: losses and gradient with what may be off."""

    def __init__(self, shape, dtype, options, *, spread=4.0):
        self.shape, self.dtype, self.options = shape, dtype, dict(options)
        rows, v = shape
        self.factor = self.options.pop("factor", None)
        self.raw = (spread * values(*shape)).to(dtype)
        generator = torch.Generator().manual_seed(v)
        self.targets = torch.randint(0, v, (rows,), generator=generator)
        self.targets[1::3] = IGNORE
        losses, gradient = self.compute(self.raw, self.targets)
        counts = (self.targets != IGNORE).double()
        scale, cap = self.options.get("scale", 1.0), self.options.get("softcap")
        z = logits_of(self.raw.double(), scale, cap)
        largest = z.abs().amax(1).clamp_min(cap or 0.0)
        share = self.options.get("label_smoothing", 0.0)
        off = S * (32 * largest + v**0.5 + 32)
        of_mean = S * share * v**0.5 * largest
        self.losses = Within(losses, counts * (off + of_mean))
        p, outer = z.softmax(1), (self.factor or 1.0) * scale
        wanted = torch.full_like(p, share / v)
        wanted += F.one_hot(self.targets.clamp_min(0), v)
        slack = outer * (p * off.unsqueeze(1) + 16 * S * (p + wanted) + 2.0**-125)
        self.gradient = Within(gradient, counts.unsqueeze(1) * slack)

    def compute(self, raw, targets, factor=None, **changes):
        """Losses and gradient in float64, by torch's own cross-entropy and autograd."""
        options = self.options | changes
        x = raw.detach().double().requires_grad_()
        z = logits_of(x, options.get("scale", 1.0), options.get("softcap"))
        share = options.get("label_smoothing", 0.0)
        losses = F.cross_entropy(
            z, targets, reduction="none", ignore_index=IGNORE, label_smoothing=share
        )
        (losses.sum() * (factor or self.factor or 1.0)).backward()
        return losses.detach(), x.grad

    def run(self, backend, layout="packed"):
        """Both results of a backend; the gradient lies in a part of a poisoned buffer."""
        device = device_of(backend)
        logits = Buffer(self.shape, self.dtype, device, layout, self.raw)
        targets = self.targets.to(device)
        factor = None if self.factor is None else torch.tensor(self.factor, device=device)
        options = self.options | {"ignore_index": IGNORE}
        poisoned = torch.full((self.shape[0],), torch.nan, device=device)
        with force_backend(backend):
            alone = cross_entropy(logits.view, targets, **options)
            assert torch.equal(logits.view.cpu(), self.raw), "the logits were modified"
            losses = cross_entropy_(logits.view, targets, **options, factor=factor, losses=poisoned)
        assert losses is poisoned
        assert torch.equal(losses, alone), "the gradient changes the losses"
        logits.check_surroundings()
        return losses, logits.view


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradient_match_float64(shape, backend, options):
    for dtype in DTYPES:
        case = Case(shape, dtype, options)
        for layout in LAYOUTS:
            losses, gradient = case.run(backend, layout)
            case.losses.check(losses, f"losses, {dtype}, {layout}")
            case.gradient.check(gradient, f"gradient, {dtype}, {layout}")
            ignored = case.targets == IGNORE
            assert not losses.cpu()[ignored].any()
            assert not gradient.cpu()[ignored].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [7, 515, 4099])
def test_wrong_answers_do_not_pass(dtype, v):
    case = Case((6, v), dtype, {"softcap": 6.0, "label_smoothing": 0.1, "factor": 3.0})
    raw, targets = case.raw.double(), case.targets
    next_class = torch.where(targets == IGNORE, IGNORE, (targets + 1) % v)
    without_last = raw.clone()
    without_last[:, -1] = -torch.inf
    wrong = {
        "another class": case.compute(raw, next_class),
        "no cap": case.compute(raw, targets, softcap=None),
        "another cap": case.compute(raw, targets, softcap=6.01),
        "no smoothing": case.compute(raw, targets, label_smoothing=0.0),
        "a scale": case.compute(raw, targets, scale=1.001 if v > 100 else 1.01),
        "rows shifted": case.compute(raw.roll(1, 0), targets),
        "the target's logit dropped": case.compute(
            raw.scatter(1, targets.clamp_min(0)[:, None], 0.0), targets
        ),
    }
    for name, (losses, gradient) in wrong.items():
        case.losses.check_refuses(losses.float(), name)
        case.gradient.check_refuses(gradient.to(dtype), name)
    p = logits_of(raw, 1.0, 6.0).softmax(1)
    slope = 1 - torch.tanh(raw / 6.0) ** 2
    counts = (targets != IGNORE).double()[:, None]
    one = F.one_hot(targets.clamp_min(0), v)
    wanted = 0.9 * one + 0.1 / v
    wrong = {
        "no slope": 3 * counts * (p - wanted),
        "no target": 3 * counts * slope * p,
        "no factor": counts * slope * (p - wanted),
        "ignored rows count": 3 * slope * (p - wanted),
        "half the smoothing": 3 * counts * slope * (p - 0.9 * one - 0.05 / v),
        "twice rounded": (3 * counts * slope * (p - wanted)).to(dtype).double() * (1 + 2.0**-6),
    }
    for name, value in wrong.items():
        case.gradient.check_refuses(value.to(dtype), name)
    case.gradient.check((3 * counts * slope * (p - wanted)).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sure_row_keeps_its_small_gradient(backend):
    """p − 1 from log p: 1 − p alone would be off by as much as p's rounding in bfloat16."""
    device = device_of(backend)
    logits = torch.zeros(1, 1024, dtype=torch.bfloat16, device=device)
    logits[0, 5] = 16.0
    targets = torch.tensor([5], device=device)
    with force_backend(backend):
        losses = cross_entropy_(logits, targets)
    exact = torch.log1p(1023 * torch.exp(torch.tensor(-16.0, dtype=torch.float64)))
    assert abs(losses.double().cpu() - exact) < 64 * S
    assert abs(logits[0, 5].double().cpu() + exact) < 2.0**-8 * exact + 64 * S
    assert exact > 1000 * S
    assert torch.exp(-exact).bfloat16() == 1  # what the subtraction would have started from


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", [64, 515, 20_000])
def test_equal_bits_from_run_to_run(backend, v):
    case = Case((3, v), torch.bfloat16, OPTIONS["all"])
    first, again = case.run(backend), case.run(backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("v", [40, 515, 4099])
def test_nan_and_infinity_pass_as_in_torch(backend, v, softcap):
    """They fill their own row; a class of -inf has no probability; a row of nothing else is NaN."""
    raw = values(6, v)
    raw[0, 3], raw[1, 4], raw[2] = torch.nan, torch.inf, -torch.inf
    raw[3, : v // 2] = -torch.inf
    raw[4, v // 2 :] = -torch.inf
    targets = torch.tensor([1, 2, 3, v - 1, 0, 5])
    x = raw.clone().requires_grad_()
    wanted = F.cross_entropy(logits_of(x, 1.0, softcap), targets, reduction="none")
    wanted.sum().backward()
    device = device_of(backend)
    for dtype in DTYPES:
        logits = raw.to(device, dtype)
        with force_backend(backend):
            losses = cross_entropy_(logits, targets.to(device), softcap=softcap)
        assert torch.equal(losses.cpu().isnan(), wanted.isnan()), dtype
        finite = ~wanted.isnan()
        assert (losses.cpu()[finite] - wanted[finite]).abs().max() < 0.05
        assert logits[~finite.to(device)].isnan().all()
        assert logits[finite.to(device)].isfinite().all()
        if softcap is None:
            assert not logits[3, : v // 2].any()


def test_a_class_that_does_not_exist_is_an_error():
    with force_backend("reference"), pytest.raises((RuntimeError, IndexError), match="out of"):
        cross_entropy(torch.zeros(2, 4), torch.tensor([1, 4]))


@pytest.mark.gpu
@pytest.mark.parametrize("target", [4, -1, 2**40])
def test_a_class_that_does_not_exist_gives_nan(target):
    """Nothing outside of the row is touched; the other rows are as they should be."""
    logits = torch.zeros(3, 4, device="cuda")
    targets = torch.tensor([1, target, IGNORE], device="cuda")
    losses = cross_entropy_(logits, targets, ignore_index=IGNORE)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, False]
    assert logits[0].tolist() == [0.25, -0.75, 0.25, 0.25]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_fine(backend):
    logits = torch.ones(0, 5, device=device_of(backend))
    targets = torch.ones(0, dtype=torch.int64, device=logits.device)
    with force_backend(backend):
        assert cross_entropy(logits, targets).shape == (0,)
        assert cross_entropy_(logits, targets).shape == (0,)


def test_misfits_are_refused():
    logits, targets = torch.ones(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"logits with 2 dimensions, got shape \(8,\)"):
        cross_entropy(torch.ones(8), targets)
    with pytest.raises(ShapeError, match="last dimension contiguous"):
        cross_entropy(torch.ones(8, 4).T, targets)
    with pytest.raises(ShapeError, match=r"targets of shape \(4,\) in torch.int64.*int32"):
        cross_entropy(logits, targets.int())
    with pytest.raises(ShapeError, match="needs targets contiguous"):
        cross_entropy(logits, torch.zeros(8, dtype=torch.int64)[::2])
    with pytest.raises(ShapeError, match=r"losses of shape \(4,\) in torch.float32"):
        cross_entropy(logits.half(), targets, losses=torch.empty(4, dtype=torch.float16))
    with pytest.raises(ShapeError, match=r"factor of shape \(\) in torch.float32"):
        cross_entropy_(logits, targets, factor=torch.ones(1))
    for wrong in ({"scale": -1.0}, {"softcap": 0.0}, {"label_smoothing": 1.0}):
        with pytest.raises(ShapeError, match="above zero and label smoothing in"):
            cross_entropy(logits, targets, **wrong)


def test_a_lost_gradient_is_refused():
    logits, targets = torch.ones(4, 8, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UserError, match="no gradient of its own"):
        cross_entropy(logits, targets)
    with torch.no_grad():
        cross_entropy(logits, targets)


@pytest.mark.parametrize("options", [(1.0, None, 0.0, None), (0.5, 3.0, 0.1, IGNORE)], ids=str)
def test_opcheck(options):
    logits, targets = torch.randn(3, 8), torch.tensor([0, 7, 3])
    op = torch.ops.qlora_kit
    torch.library.opcheck(op.cross_entropy, (logits, targets, *options, torch.empty(3)))
    for factor in (None, torch.tensor(2.0)):
        arguments = (logits, targets, *options, factor, torch.empty(3))
        torch.library.opcheck(op.cross_entropy_, arguments)


def test_compiled_code_calls_the_op():
    logits, targets = torch.randn(3, 8), torch.tensor([0, 7, 3])

    def both(logits, targets):
        z = logits * 2
        first = cross_entropy(z, targets)
        return first, cross_entropy_(z, targets, softcap=3.0), z

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(logits, targets), both(logits, targets), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("processor_kib", [100, 164, 228])
def test_every_plan_fits_its_processor(processor_kib):
    processor = processor_kib * 1024
    for row_bytes in [1, 2, 100, 4096, 32_000, 64_000, 100_514, 256_512, 524_288, 1_048_576]:
        chosen = plan(row_bytes, processor)
        assert chosen.threads & (chosen.threads - 1) == 0
        assert 32 <= chosen.threads <= 1024 // chosen.blocks
        assert chosen.shared % 16 == 0
        # a block's own kilobyte and the one that CUDA takes come on top
        assert chosen.blocks * (chosen.shared + 2048) <= processor
        assert chosen.blocks == 1 or chosen.shared >= row_bytes  # two only where both stay


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("v", [32_000, 50_257, 128_256, 262_144, 262_145])
def test_vocabularies(v, options):
    """Rows two to a processor, alone on it, and longer than its shared memory."""
    for dtype in DTYPES:
        case = Case((4, v), dtype, options)
        for layout in ("packed", "shifted"):
            losses, gradient = case.run("cuda", layout)
            case.losses.check(losses, f"{dtype}, {layout}")
            case.gradient.check(gradient, f"{dtype}, {layout}")


@pytest.mark.gpu
def test_many_rows():
    """A chunk as in training, and more rows than the GPU holds; rows kept or read twice."""
    raw = torch.randn(1500, 128_256, device="cuda").bfloat16() * 4
    targets = torch.randint(0, 128_256, (1500,), device="cuda")
    targets[::7] = IGNORE
    kept, again = raw.clone(), raw.clone()
    losses = cross_entropy_(kept, targets, ignore_index=IGNORE)
    twice = torch.empty_like(losses)
    cuda.run(again, targets, 1.0, None, 0.0, IGNORE, twice, True, None, keep=False)
    wanted = F.cross_entropy(raw.float(), targets, ignore_index=IGNORE, reduction="none")
    counts = targets != IGNORE
    for got, gradient in ((losses, kept), (twice, again)):
        assert (got - wanted).abs().max() < 3e-5
        assert gradient.float().sum(1).abs().max() < 0.02  # softmax minus one target is zero
        chosen = gradient[counts].gather(1, targets[counts].unsqueeze(1)).float().squeeze(1)
        assert torch.allclose(chosen, torch.expm1(-wanted[counts]), rtol=2.0**-8, atol=1e-6)
    assert (kept != again).sum() < 1e-3 * kept.numel()  # sums in another order


@pytest.mark.gpu
def test_in_a_graph_and_without_waiting():
    raw = torch.randn(64, 32_000, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 32_000, (64,), device="cuda")
    factor = torch.tensor(0.5, device="cuda")
    wanted = raw.clone()
    losses = cross_entropy_(wanted, targets, factor=factor)
    graph, logits = torch.cuda.CUDAGraph(), raw.clone()
    with torch.cuda.graph(graph):
        captured = cross_entropy_(logits, targets, factor=factor)
    logits.copy_(raw)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.replay()
        other = raw.clone()
        cross_entropy_(other, targets, factor=factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, expected in ((captured, losses), (logits, wanted), (other, wanted)):
        assert torch.equal(got, expected)
