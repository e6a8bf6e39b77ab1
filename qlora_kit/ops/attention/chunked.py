"""Attention in plain torch that serves everything, a chunk of queries at a time.

Documents, windows, softcaps, float32 and float64, any head dimension, any device. With s the
capped scores of a chunk and L their logsumexp, kept from the forward:

    p = exp(s - L)          out = p·v
    dv = pᵀ·dout            dp = dout·vᵀ        ds = p·(dp - rowsum(dout·out))
    dq = ds·k·scale         dk = dsᵀ·q·scale    (ds times 1 - (s/c)² under a softcap c)

A chunk's scores are the largest thing that exists: at most `CHUNK_SCORES` of them, in
float32, and only against the keys that any of its queries can see: at most a window, or the
longest document, further back. Which those are follows from numbers the host has, so nothing
waits for the GPU. Where the documents start is looked up on the device.

Sums run in float32 (float64 for float64). On a GPU the 16-bit products keep their operands and
give float32; p and ds are rounded to 16 bits before they are multiplied, as in every
FlashAttention. Nothing is added in a varying order: results repeat.
"""

import torch
from torch import Tensor

from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents

CHUNK_SCORES = 1 << 25
"""Scores that exist at a time, 128 MiB in float32; a few copies of them live at once."""
SMALLEST_CHUNK = 16


def refuses(call: Call) -> str | None:
    """Why it cannot serve a call: never.

    Args:
        call: what decides.

    Returns:
        A short reason, None if it can.
    """
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: (B, T, Hq, D) floating point; B = 1 with documents.
        k: (B, T, Hk, D).
        v: (B, T, Hk, D).
        rule: what to compute.
        documents: starts on the same device, or None.

    Returns:
        (B, T, Hq, D) contiguous; (B, Hq, T) logsumexp, float32 (float64 for float64).
    """
    rows, t, heads, _ = q.shape
    plan = _Plan(q, k, rule, documents)
    out = q.new_empty(q.shape)
    lse = q.new_empty((rows, heads, t), dtype=plan.wide)
    keys, values = plan.by_head(k), plan.by_head(v)
    for first, end, seen in plan.chunks():
        scores, _ = plan.scores(plan.grouped(q, first, end), keys[:, seen:end], first, seen)
        sums = scores.logsumexp(-1)
        p = scores.sub_(sums.unsqueeze(-1)).exp_()
        part = plan.product(p, values[:, seen:end])
        out[:, first:end] = plan.ungrouped(part)
        lse[:, :, first:end] = sums.view(rows, heads, end - first)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: AttentionRule,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `forward`.

    Args:
        dout: (B, T, Hq, D) contiguous.
        q: as in the forward.
        k: as in the forward.
        v: as in the forward.
        out: its result.
        lse: its logsumexp.
        rule: what was computed.
        documents: as in the forward.

    Returns:
        Gradients of q, k and v, contiguous.
    """
    plan = _Plan(q, k, rule, documents)
    dq = q.new_empty(q.shape)
    keys, values = plan.by_head(k), plan.by_head(v)
    dk, dv = (torch.zeros_like(t, dtype=plan.wide) for t in (keys, values))
    for first, end, seen in plan.chunks():
        queries = plan.grouped(q, first, end)
        gradient = plan.grouped(dout, first, end)
        sums = lse[:, :, first:end].reshape(*queries.shape[:2], 1)
        delta = (gradient.to(plan.wide) * plan.grouped(out, first, end)).sum(-1, keepdim=True)
        scores, slope = plan.scores(queries, keys[:, seen:end], first, seen, True)
        p = scores.sub_(sums).exp_()
        dv[:, seen:end] += plan.product(p.mT, gradient)
        ds = plan.product(gradient, values[:, seen:end].mT).sub_(delta).mul_(p)
        ds.mul_(rule.scale)
        if slope is not None:
            ds.mul_(slope)
        dk[:, seen:end] += plan.product(ds.mT, queries)
        dq[:, first:end] = plan.ungrouped(plan.product(ds, keys[:, seen:end]))
    rows = q.shape[0]
    dk, dv = (t.unflatten(0, (rows, -1)).transpose(1, 2).to(q.dtype) for t in (dk, dv))
    return dq, dk.contiguous(), dv.contiguous()


class _Plan:
    """How one call is cut, and its products. Grouped: (B·Hk, G·C, ·), with G = Hq / Hk."""

    def __init__(
        self, q: Tensor, k: Tensor, rule: AttentionRule, documents: Documents | None
    ) -> None:
        self.rows, self.t, self.heads, self.dim = q.shape
        self.kv_heads = k.shape[2]
        self.group = self.heads // self.kv_heads
        self.rule = rule
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.mixed = q.device.type == "cuda" and q.dtype != self.wide
        self.tokens = torch.arange(self.t, device=q.device)
        self.starts: Tensor | None = None
        reach = self.t if rule.window is None else min(self.t, rule.window)
        if documents is not None:
            reach = min(reach, documents.longest)
            ends = documents.starts[1:].contiguous()
            index = torch.searchsorted(ends, self.tokens.to(ends.dtype), right=True)
            self.starts = documents.starts[index]
        self.reach = reach

    def chunks(self) -> list[tuple[int, int, int]]:
        """Each chunk's first query, the query after its last, and the first key any sees."""
        found = []
        first = 0
        while first < self.t:
            seen = max(0, first - self.reach + 1)
            end = min(self.t, first + self._size(first - seen))
            found.append((first, end, seen))
            first = end
        return found

    def _size(self, before: int) -> int:
        """The largest power of two whose scores fit, given the keys before the chunk."""
        size = SMALLEST_CHUNK
        while self.rows * self.heads * 2 * size * (before + 2 * size) <= CHUNK_SCORES:
            size *= 2
        return size

    def by_head(self, t: Tensor) -> Tensor:
        """(B, T, Hk, D) to (B·Hk, T, D)."""
        return t.transpose(1, 2).reshape(self.rows * self.kv_heads, self.t, self.dim)

    def grouped(self, t: Tensor, first: int, end: int) -> Tensor:
        """Some tokens of (B, T, Hq, D), grouped."""
        part = t[:, first:end].transpose(1, 2)  # (B, Hq, C, D)
        return part.reshape(self.rows * self.kv_heads, self.group * (end - first), self.dim)

    def ungrouped(self, t: Tensor) -> Tensor:
        """Grouped to (B, C, Hq, D)."""
        return t.view(self.rows, self.heads, -1, self.dim).transpose(1, 2)

    def scores(
        self, queries: Tensor, keys: Tensor, first: int, seen: int, slopes: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B·Hk, G·C, S) masked scores of a chunk, and the softcap's slopes if asked for."""
        scores = self.product(queries, keys.mT).mul_(self.rule.scale)
        slope = None
        if self.rule.softcap is not None:
            scores.div_(self.rule.softcap).tanh_()
            slope = 1 - scores * scores if slopes else None
            scores.mul_(self.rule.softcap)
        hidden = self._hidden(first, seen + keys.shape[1], seen)
        scores.view(-1, self.group, *hidden.shape).masked_fill_(hidden, float("-inf"))
        return scores, slope

    def _hidden(self, first: int, end: int, seen: int) -> Tensor:
        """(C, S): which keys a query must not see."""
        query, key = self.tokens[first:end, None], self.tokens[None, seen:end]
        hidden = key > query
        if self.rule.window is not None:
            hidden |= key <= query - self.rule.window
        if self.starts is not None:
            hidden |= key < self.starts[first:end, None]
        return hidden

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a·b in the wide dtype, from operands in the dtype of q on a GPU."""
        if self.mixed:  # needs a GPU
            return _mixed_product(a, b)
        return a.to(self.wide) @ b.to(self.wide)


def _mixed_product(a: Tensor, b: Tensor) -> Tensor:  # needs a GPU
    half = b.dtype if a.dtype == torch.float32 else a.dtype
    return torch.bmm(a.to(half), b.to(half), out_dtype=torch.float32)
