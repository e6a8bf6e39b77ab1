"""The chunked loss head is cross-entropy on all logits, without all logits.

Bounds, in units of the roundoff u of the dtype: with float64 inputs everything is float64
and the truth is the same arithmetic in another order, so a few hundred u of slack is for sums
of up to a few hundred terms. With 16-bit inputs the logits, their gradient and each product
are rounded once (u of the dtype each) while sums are float32, so relative errors of whole
gradients stay within a few u.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.core.errors import ShapeError
from qlora_kit.nn import loss_head
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.loss_head import IGNORE, HeadLoss, LogitRule, chunk_tokens_for, head_loss
from qlora_kit.quant.config import QuantConfig

HIDDEN, VOCAB, CHUNK = 32, 97, 8
EPS64 = torch.finfo(torch.float64).eps
RULES = {
    "plain": LogitRule(),
    "scale": LogitRule(scale=0.25),
    "cap": LogitRule(softcap=2.0),
    "both": LogitRule(scale=1.5, softcap=3.0),
}


def case(
    tokens: int, dtype: torch.dtype = torch.float64, *, bias: bool = True, seed: int = 0
) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head, hidden states (S, H) that want a gradient, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    targets[2::5] = IGNORE
    return head, hidden, targets


def truth(
    head: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    rule: LogitRule | None = None,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Summed cross-entropy of all logits in float64, and its gradients."""
    rule = rule or LogitRule()
    x = hidden.detach().double().requires_grad_()
    w = head.weight.detach().double().requires_grad_()
    b = None if head.bias is None else head.bias.detach().double().requires_grad_()
    z = F.linear(x, w, b) * rule.scale
    if rule.softcap is not None:
        z = rule.softcap * torch.tanh(z / rule.softcap)
    each = F.cross_entropy(
        z, targets, reduction="none", label_smoothing=smoothing, ignore_index=IGNORE
    )
    each.sum().backward()
    found = {"total": each.sum(), "tokens": each, "hidden": x.grad, "weight": w.grad}
    return found | ({} if b is None else {"bias": b.grad})


def measured(head: nn.Linear, hidden: Tensor, loss: HeadLoss) -> dict[str, Tensor]:
    """The same numbers of ours; runs the backward."""
    loss.total.backward()
    found = {"total": loss.total, "tokens": loss.tokens, "hidden": hidden.grad}
    found |= {"weight": head.weight.grad}
    return found | ({} if head.bias is None else {"bias": head.bias.grad})


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; absolute where that is zero."""
    scale = wanted.detach().norm().item() or 1.0
    return (found.detach().double() - wanted.detach()).norm().item() / scale


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("bias", [False, True])
def test_float64_is_exact(rule: LogitRule, smoothing: float, bias: bool) -> None:
    """Loss and every gradient, all options, several chunks; and the options matter."""
    head, hidden, targets = case(21, bias=bias)
    wanted = truth(head, hidden, targets, rule, smoothing)
    loss = head_loss(
        head, hidden, targets, rule=rule, label_smoothing=smoothing, chunk_tokens=CHUNK
    )
    found = measured(head, hidden, loss)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert error(found[name], wanted[name]) < 256 * EPS64, name
    other = truth(head, hidden, targets, LogitRule(softcap=5.0), 0.3)
    assert all(error(found[name], other[name]) > 1e-3 for name in wanted)  # the bound bites


@pytest.mark.parametrize("module", [False, True], ids=["weight", "module"])
@pytest.mark.parametrize("tokens", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_chunk_boundaries(tokens: int, module: bool) -> None:
    """No token is lost or counted twice, whether the weight is read or the module called."""
    head, hidden, targets = case(tokens)
    wanted = truth(head, hidden, targets)
    calls: list[int] = []
    if module:
        head.register_forward_hook(lambda _m, inputs, _out: calls.append(len(inputs[0])))
    found = measured(head, hidden, head_loss(head, hidden, targets, chunk_tokens=CHUNK))
    for name in wanted:
        assert error(found[name], wanted[name]) < 256 * EPS64, name
    assert sum(calls) == (tokens if module else 0)
    assert max(calls, default=0) <= CHUNK
    if tokens > CHUNK:
        cut = truth(head, hidden[:-1], targets[:-1])
        assert error(found["weight"], cut["weight"]) > 1e-4  # one token less is noticed


@pytest.mark.parametrize("module", [False, True], ids=["weight", "module"])
def test_all_ignored(module: bool) -> None:
    """Zero loss and zero gradients, not a division by zero tokens."""
    head, hidden, targets = case(2 * CHUNK + 1)
    if module:
        head.register_forward_hook(lambda _m, _i, _o: None)
    found = measured(
        head,
        hidden,
        head_loss(head, hidden, torch.full_like(targets, IGNORE), chunk_tokens=CHUNK),
    )
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_low_precision(dtype: torch.dtype, rule: LogitRule, smoothing: float) -> None:
    """16-bit inputs: float32 softmax and sums, gradients within a few roundings."""
    head, hidden, targets = case(3 * CHUNK + 5, dtype)
    wanted = truth(head, hidden, targets, rule, smoothing)
    loss = head_loss(
        head, hidden, targets, rule=rule, label_smoothing=smoothing, chunk_tokens=CHUNK
    )
    found = measured(head, hidden, loss)
    assert loss.total.dtype == loss.tokens.dtype == torch.float32
    assert found["hidden"].dtype == found["weight"].dtype == dtype
    # Logits, of size sqrt(H) = 6, are rounded by up to 3 eps, 1.7 eps in the mean; the factor
    # 1.5 makes that a relative change of p by 2.6 eps. Its own rounding and that of the
    # products add an eps/2 each. In float32 the sums of V and S terms are rounded as well.
    bound = (8 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    for name in wanted:
        assert error(found[name], wanted[name]) < bound, name
    broken = truth(head, hidden, targets.roll(1), rule, smoothing)
    assert all(error(found[n], broken[n]) > 4 * bound for n in ("tokens", "hidden", "weight"))


def test_weight_sums_are_float32() -> None:
    """Many chunks whose parts a bfloat16 running sum would swallow: that sum stops growing."""
    tokens, hidden_size = 1024, 4
    head = nn.Linear(hidden_size, 8, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    hidden = torch.ones(tokens, hidden_size, dtype=torch.bfloat16)
    targets = torch.zeros(tokens, dtype=torch.int64)
    head_loss(head, hidden, targets, chunk_tokens=1).total.backward()
    expected = torch.full((8, hidden_size), tokens / 8.0)
    expected[0] -= tokens
    assert torch.equal(head.weight.grad.float(), expected)
    running = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(tokens):
        running += 1 / 8
    assert running.item() != tokens / 8


def test_scale_of_the_loss_comes_in_float32() -> None:
    """float16 with a factor that would not fit in it: nothing over- or underflows."""
    head, hidden, targets = case(11, torch.float16, bias=False)
    head.requires_grad_(False)
    wanted = truth(head, hidden, targets)["hidden"]
    for factor in (2.0**17 / 5e4, 2.0**-20):  # a loss scale over tokens; a tiny one
        hidden.grad = None
        (head_loss(head, hidden, targets, chunk_tokens=4).total * factor).backward()
        least = 2.0**-25 / (wanted.abs().max().item() * factor)  # half of float16's last place
        assert error(hidden.grad, wanted * factor) < 24 * 2**-10 + 8 * least


def test_frozen_head_gets_no_gradient() -> None:
    """Only the hidden states do, with the same bits as in a trained head."""
    head, hidden, targets = case(2 * CHUNK + 3)
    head_loss(head, hidden, targets, chunk_tokens=CHUNK).total.backward()
    wanted, hidden.grad = hidden.grad, None
    head.requires_grad_(False)
    head.weight.grad = head.bias.grad = None
    head_loss(head, hidden, targets, chunk_tokens=CHUNK).total.backward()
    assert torch.equal(hidden.grad, wanted)
    assert head.weight.grad is None
    assert head.bias.grad is None
    detached = head_loss(head, hidden.detach(), targets, chunk_tokens=CHUNK)
    assert not detached.total.requires_grad


def test_no_grad_and_repeats() -> None:
    """Under `no_grad` the losses are the same bits; so are they in a second run."""
    head, hidden, targets = case(2 * CHUNK + 3, torch.bfloat16)
    first = head_loss(head, hidden, targets, chunk_tokens=CHUNK)
    with torch.no_grad():
        second = head_loss(head, hidden, targets, chunk_tokens=CHUNK)
    assert not second.total.requires_grad
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.total, second.total)
    assert not first.tokens.requires_grad


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nf4_and_lora_heads(rule: LogitRule) -> None:
    """A quantized head passes gradients through, an adapter on it gets its own."""
    torch.manual_seed(0)
    nf4 = NF4Linear.from_linear(nn.Linear(64, VOCAB), QuantConfig())
    head = LoRALinear(nf4, "lm_head", LoRA(rank=4), seed=0)
    nn.init.normal_(head.lora_B)
    hidden = torch.randn(2 * CHUNK + 3, 64, requires_grad=True)
    targets = torch.randint(0, VOCAB, (2 * CHUNK + 3,))
    z = head(hidden) * rule.scale
    if rule.softcap is not None:
        z = rule.softcap * torch.tanh(z / rule.softcap)
    F.cross_entropy(z, targets, reduction="sum").backward()
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    wanted = [p.grad.clone() for p in inputs]
    for p in inputs:
        p.grad = None
    head_loss(head, hidden, targets, rule=rule, chunk_tokens=CHUNK).total.backward()
    assert len(inputs) == 3
    for found, expected in zip(inputs, wanted, strict=True):
        assert error(found.grad, expected.double()) < 64 * torch.finfo(torch.float32).eps
    alone = head_loss(nf4, hidden, targets, rule=rule, chunk_tokens=CHUNK).total
    assert abs(alone - F.cross_entropy(z, targets, reduction="sum")).item() > 1e-2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_nf4_head_is_decoded_once(
    bias: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss and gradient are those of its own forward, whatever the number of chunks."""
    torch.manual_seed(0)
    head = NF4Linear.from_linear(nn.Linear(64, VOCAB, bias=bias), QuantConfig())
    hidden = torch.randn(3 * CHUNK + 3, 64, requires_grad=True)
    targets = torch.randint(0, VOCAB, (len(hidden),))
    decoded: list[torch.dtype] = []
    decode = NF4Linear.dequantize

    def count(layer: NF4Linear, dtype: torch.dtype | None = None) -> Tensor:
        decoded.append(dtype)
        return decode(layer, dtype)

    monkeypatch.setattr(NF4Linear, "dequantize", count)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        F.cross_entropy(head(hidden).float(), targets, reduction="sum").backward()
        wanted, hidden.grad = hidden.grad, None
        assert not decoded
        loss = head_loss(head, hidden, targets, chunk_tokens=CHUNK)
    loss.total.backward()
    assert decoded == [torch.bfloat16 if autocast else torch.float32]
    bound = 4 * torch.finfo(decoded[0]).eps if autocast else 64 * torch.finfo(torch.float32).eps
    assert error(hidden.grad, wanted.double()) < bound
    assert error(hidden.grad.roll(1, 0), wanted.double()) > 4 * bound
    assert head.bias is None or head.bias.grad is None


def test_a_trained_weight_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of its rows are taken at a time."""
    monkeypatch.setattr(loss_head, "_WEIGHT_ROWS", 40)
    monkeypatch.setattr(loss_head, "_SCALED_ROWS", 7)
    head, hidden, targets = case(21)
    wanted = truth(head, hidden, targets)
    found = measured(head, hidden, head_loss(head, hidden, targets, chunk_tokens=CHUNK))
    for name in wanted:
        assert error(found[name], wanted[name]) < 256 * EPS64, name


@pytest.mark.parametrize("kind", ["keeps its output", "hands out its input"])
def test_what_a_head_gives_stays_as_it_is(kind: str) -> None:
    """Gradients take the place of our own logits only: never of what the head's backward reads."""
    linear, hidden, targets = case(CHUNK + 3)
    head = nn.Sequential(linear, nn.Tanh()) if kind == "keeps its output" else nn.Identity()
    x = hidden if kind == "keeps its output" else linear(hidden).detach().requires_grad_()
    before = x.detach().clone()
    targets = targets.clamp_min(0)
    F.cross_entropy(head(x), targets, reduction="sum").backward()
    wanted, x.grad = x.grad, None
    head_loss(head, x, targets, chunk_tokens=CHUNK).total.backward()
    assert error(x.grad, wanted) < 256 * EPS64
    assert torch.equal(x, before)


def test_tied_head_adds_to_the_embedding() -> None:
    """One parameter, used before and after: both parts arrive."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.float64)
    ids, targets = torch.randint(0, VOCAB, (2, 19))
    z = F.embedding(ids, head.weight) @ head.weight.T
    F.cross_entropy(z, targets, reduction="sum").backward()
    wanted, head.weight.grad = head.weight.grad, None
    hidden = F.embedding(ids, head.weight)
    head_loss(head, hidden, targets, chunk_tokens=CHUNK).total.backward()
    assert error(head.weight.grad, wanted) < 256 * EPS64


def test_autocast_is_followed() -> None:
    """float32 parameters under autocast: the products of the autocast dtype, as in the model."""
    head, hidden, targets = case(2 * CHUNK + 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(hidden)
        wanted = F.cross_entropy(z.float(), targets, reduction="none")
        found = head_loss(head, hidden, targets, chunk_tokens=CHUNK)
    found.total.backward()
    assert torch.allclose(found.tokens, wanted, rtol=1e-6, atol=1e-6)
    exact = head_loss(head, hidden, targets, chunk_tokens=CHUNK)
    assert not torch.allclose(exact.tokens, wanted, rtol=1e-6, atol=1e-6)
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("module", [False, True], ids=["weight", "module"])
def test_memory_is_a_chunk(module: bool) -> None:
    """Nothing larger than (chunk, V) is made, and only (S, H) is saved."""
    tokens, vocab, chunk = 512, 2048, 16
    head = nn.Linear(HIDDEN, vocab, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    if module:
        head.register_forward_hook(lambda _m, _i, _o: None)
    hidden = torch.randn(tokens, HIDDEN).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    bound = max(chunk * vocab, vocab * HIDDEN)  # the head's own weight is seen as a view
    with Largest() as ours:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = head_loss(head, hidden, targets, chunk_tokens=chunk, ignore_index=None)
        if not module:
            assert saved == [tokens * HIDDEN * 2]
        loss.total.backward()
    assert ours.elements <= bound
    with Largest() as plain:
        F.cross_entropy(head(hidden).float(), targets).backward()
    assert plain.elements == tokens * vocab > 8 * bound  # what the measurement would notice


def test_chunks_follow_from_the_vocabulary() -> None:
    """A power of two within limits; 256 MiB in 16 bits."""
    assert [chunk_tokens_for(v) for v in (2, 50_257, 151_936, 10**7)] == [4096, 2048, 512, 128]
    for vocab in (32_000, 128_256, 262_144):
        assert chunk_tokens_for(vocab) * vocab * 2 <= 2**28


def test_the_vocabularys_chunk_is_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody names another: nothing of all tokens' size, whatever memory is free."""
    asked: list[int] = []
    monkeypatch.setattr(loss_head, "chunk_tokens_for", lambda vocab: asked.append(vocab) or 16)
    head = nn.Linear(HIDDEN, 2048, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(512, HIDDEN), torch.randint(0, 2048, (512,))
    with Largest() as ours:
        head_loss(head, hidden.requires_grad_(), targets)
    assert asked == [2048]
    assert ours.elements <= 2048 * HIDDEN < 512 * 2048


def test_refuses_unflattened_states() -> None:
    """The message says what to do."""
    head, hidden, targets = case(6)
    with pytest.raises(ShapeError, match="Flatten batch and sequence"):
        head_loss(head, hidden.view(2, 3, HIDDEN), targets)
