"""Cases of attention, their truth in float64, and how far from it a result may lie.

The truth is plain softmax attention over all scores, of q, k and v as the op sees them. With
u the unit roundoff of the dtype, the op's own roundings are

- out, dq, dk, dv once each, and with grouped heads dk and dv of each query head: u·|·|;
- p before it meets v, and before it meets dout: u·p;
- ds before it meets k and q: u·|ds|;
- out inside rowsum(dout·out), which every ds of a row shares;
- float16 ends at 2**-14: below, a rounding costs up to 2**-25 whatever the value;
- float32 sums, STEP·√n·‖a‖·‖b‖ each as in helpers.py, of the scores (which the softmax turns
  into relative errors of p, of both the score and the logsumexp), of dp, and of the results.

Added up per element the bound holds for every element. For the Frobenius norm roundings to 16
bits count as independent, so squares are added, and float32's part is added as it is.
"""

from dataclasses import dataclass

import torch

from qlora_kit.ops.attention.pair import attention_backward, attention_forward
from qlora_kit.ops.attention.rule import AttentionRule, Documents
from tests.ops.helpers import SECOND_ORDER, STEP, UNIT, Expected

SHAPES = [  # B, T, Hq, Hk, D: every ratio of heads, odd lengths, every width
    (2, 37, 2, 2, 64),
    (1, 129, 8, 2, 80),
    (2, 33, 8, 1, 96),
    (1, 257, 4, 1, 128),
    (1, 70, 4, 4, 256),
]
RESULTS = ("out", "dq", "dk", "dv")


@dataclass
class Case:
    """Operands of one call: strided views of one buffer, as a fused projection gives them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    rule: AttentionRule
    documents: Documents | None


def make_case(shape, *, dtype=torch.float32, device="cpu", documents=None, **rule):
    """Random operands. `documents`: lengths that repeat until the rows are full, or None."""
    b, t, heads, kv_heads, dim = shape
    generator = torch.Generator(device).manual_seed(b * 1_000_003 + t * 1009 + heads * 31 + dim)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    buffer = normal(b * t, sum(widths) + 8)  # 8 columns that are not ours
    parts = buffer[:, : sum(widths)].split(widths, 1)
    q, k, v = (part.view(b, t, part.shape[1] // dim, dim) for part in parts)
    rule = AttentionRule(**{"scale": dim**-0.5} | rule)
    placed = None if documents is None else pack(b, t, documents).to(device)
    return Case(q, k, v, normal(b, t, heads, dim), rule, placed)


def positions(b, t, lengths):
    """(B, T) position ids of documents of these lengths, over and over."""
    row = torch.cat([torch.arange(n) for n in lengths])
    return row.repeat(-(-t // len(row)))[:t].expand(b, t)


def pack(b, t, lengths):
    """Documents of these lengths, over and over, in each row."""
    return Documents.from_positions(positions(b, t, lengths))


def run(case):
    """Forward and backward of the pair, by name."""
    arguments = case.q, case.k, case.v
    out, saved = attention_forward(*arguments, case.rule, case.documents)
    gradients = attention_backward(case.dout, *arguments, out, saved, case.rule, case.documents)
    return dict(zip(RESULTS, (out, *gradients), strict=True))


def hidden(case):
    """(B, T, T): which keys a query must not see."""
    b, t = case.q.shape[:2]
    query, key = torch.arange(t)[:, None], torch.arange(t)[None]
    mask = key > query
    if case.rule.window is not None:
        mask = mask | (key <= query - case.rule.window)
    mask = mask.expand(b, t, t)
    if case.documents is not None:
        first = torch.zeros(b * t, dtype=torch.int64)
        starts = case.documents.starts.cpu()
        first[starts[starts < b * t].long()] = 1
        number = first.cumsum(0).view(b, t)
        mask = mask | (number[:, :, None] != number[:, None, :])
    return mask


def _heads(t, group=1):
    """(B, T, H, D) to (B, H, T, D) float64, heads repeated."""
    return t.detach().double().transpose(1, 2).repeat_interleave(group, 1)


def _back(t, group=1):
    """(B, H, T, D) to (B, T, H / group, D), summed."""
    return t.unflatten(1, (-1, group)).sum(2).transpose(1, 2)


def _norms(t, dim=-1):
    return t.norm(dim=dim, keepdim=True)


def _product_error(a, b):
    """Of a·b summed in float32: (.., M, K) and (.., K, N)."""
    return STEP * a.shape[-1] ** 0.5 * _norms(a) * _norms(b, -2)


@dataclass
class _Step:
    """A tensor of the computation with its error per element, and roundings as variances."""

    value: torch.Tensor
    error: torch.Tensor
    """The largest it can be."""
    low: torch.Tensor
    """The part of it that float32 sums have."""
    variance: torch.Tensor
    """Of the roundings to the dtype, taken as independent."""


class Truth:
    """What each result of a case should be, with its bounds."""

    def __init__(self, case):
        self.case, self.unit = case, UNIT.get(case.q.dtype, 2.0**-53)
        self.tiny = torch.finfo(case.q.dtype).smallest_normal * self.unit
        self.group = case.q.shape[2] // case.k.shape[2]
        self.q, self.dout = _heads(case.q), _heads(case.dout)
        self.k, self.v = _heads(case.k, self.group), _heads(case.v, self.group)
        self._attend()
        p, out, ds = self.p, self.out, self._score_gradient()
        low = self.relative * p
        dv = self._rounded_product(p.mT, self.dout, low.mT)
        dq = self._product_of(ds, self.k, transposed=False)
        dk = self._product_of(ds, self.q, transposed=True)
        self.results = {
            "out": self._result(out, 1),
            "dq": self._result(dq, 1),
            "dk": self._result(dk, self.group),
            "dv": self._result(dv, self.group),
        }

    def _attend(self):
        """p with its relative error, and out."""
        rule, q, k = self.case.rule, self.q, self.k
        raw = q @ k.mT * rule.scale
        self.slope = torch.ones_like(raw)
        scores = raw
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(raw / rule.softcap)
            self.slope = 1 - (scores / rule.softcap) ** 2
        mask = hidden(self.case).to(q.device)[:, None]
        self.p = scores.masked_fill(mask, float("-inf")).softmax(-1)
        error = _product_error(q, k.mT) * rule.scale + 8 * STEP * scores.abs()
        error = error.masked_fill(mask, 0).amax(-1, keepdim=True)  # a row's logsumexp has the worst
        self.relative = 2 * error + STEP * (4 + q.shape[2] ** 0.5)
        self.out = self._rounded_product(self.p, self.v, self.relative * self.p)

    def _rounded_product(self, p, right, low):
        """p·right, p rounded to the dtype, with an error `low` of its own; then rounded."""
        low = (low + self.tiny) @ right.abs() + _product_error(p, right)
        variance = self.unit**2 * (p**2 @ right**2)
        return _Step(p @ right, self.unit * p @ right.abs() + low, low, variance)

    def _score_gradient(self):
        """ds, not yet rounded; its variance is that of rowsum(dout·out), (.., T, 1)."""
        p, out, dout = self.p, self.out, self.dout
        dp, delta = dout @ self.v.mT, (dout * out.value).sum(-1, keepdim=True)
        self.pulled = p * self.slope * self.case.rule.scale
        value = self.pulled * (dp - delta)
        low = self.pulled * _product_error(dout, self.v.mT) + 4 * self.relative * value.abs()
        sums = STEP * dout.shape[-1] ** 0.5 * _norms(dout) * _norms(out.value)
        low = low + self.pulled * ((dout.abs() * out.low).sum(-1, keepdim=True) + sums)
        rounded = out.error - out.low + self.unit * out.value.abs()
        error = low + self.pulled * (dout.abs() * rounded).sum(-1, keepdim=True)
        squares = out.variance + (self.unit * out.value) ** 2
        return _Step(value, error, low, (dout**2 * squares).sum(-1, keepdim=True))

    def _product_of(self, ds, right, *, transposed):
        """ds·right or dsᵀ·right, ds rounded to the dtype."""
        value, pulled = (t.mT if transposed else t for t in (ds.value, self.pulled))
        error, low = (t.mT if transposed else t for t in (ds.error, ds.low))
        variance = self.unit**2 * (value**2 @ right**2)
        if transposed:
            variance = variance + (ds.variance * self.pulled**2).mT @ right**2
        else:  # one error for a whole row of ds
            variance = variance + ds.variance * (pulled @ right) ** 2
        low = (low + self.tiny) @ right.abs() + _product_error(value, right)
        error = (error + self.unit * value.abs() + self.tiny) @ right.abs() + _product_error(
            value, right
        )
        return _Step(value @ right, error, low, variance)

    def _result(self, step, group):
        """Rounded for each query head, and once more after a sum over the heads of a group."""
        own = self.unit * step.value.abs() + self.tiny
        total = _back(step.value, group)
        error, variance = _back(step.error + own, group), _back(step.variance + own**2, group)
        if group > 1:
            error = error + self.unit * total.abs()
            variance = variance + (self.unit * total) ** 2
        low = error if self.unit <= STEP else _back(step.low, group)
        norm = variance.sum().sqrt() + low.norm()
        return Expected(total, SECOND_ORDER * error, SECOND_ORDER * norm.item())

    def check(self, got, what):
        """Hold all results against their bounds."""
        for name, expected in self.results.items():
            expected.check(got[name], f"{name} of {what}")

    def worst(self, got):
        """The largest error in units of its bound, of the result where that is smallest."""
        return min(expected.worst(got[name]) for name, expected in self.results.items())

    def values(self):
        """The true results, by name."""
        return {name: expected.value for name, expected in self.results.items()}
