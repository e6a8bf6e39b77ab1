"""The loss head: output projection and cross-entropy, a chunk of tokens at a time.

Logits are the largest tensor of a training step: 8,192 tokens of 128k classes are 2 GB in
bfloat16 and 4 GB in float32, several times over once the softmax and its gradient are
counted. None of it is needed afterwards. So the head is applied to a chunk of tokens, the
loss and the gradient of that chunk are taken at once, and the logits are dropped before the
next chunk: what stays is the gradient of the hidden states, (S, H), and in a trained head
that of its parameters. The backward pass only multiplies these by the incoming scalar.

The gradient kept is that of the *sum* of the losses. Dividing by the number of tokens, and
float16's loss scale, come in through the scalar, in float32, so nothing small is rounded away.

A chunk's size follows from the vocabulary alone, never from the memory that happens to be
free: the same batch gives the same bits on every machine of a kind.

Memory beyond hidden states and results: O(chunk x V). Truth: `F.cross_entropy` on all logits.
Idea: arXiv:2411.09009 (never hold all logits), arXiv:2410.10989 (gradient in the forward).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.core.errors import ShapeError

IGNORE = -100
"""Label of a position that does not count."""

CHUNK_LOGITS = 1 << 26
"""Logits that exist at a time: 256 MiB for each float32 copy of a chunk."""

SMALLEST_CHUNK, LARGEST_CHUNK = 128, 4096
"""Tokens: below, a GPU's matrix units idle; above, nothing gets faster."""


def chunk_tokens_for(vocab_size: int) -> int:
    """Tokens whose logits exist at a time.

    Args:
        vocab_size: V.

    Returns:
        The power of two that keeps a chunk within `CHUNK_LOGITS`, between 128 and 4,096.

    Example:
        >>> chunk_tokens_for(32_000), chunk_tokens_for(128_256), chunk_tokens_for(262_144)
        (2048, 512, 256)
    """
    fitting = max(1, CHUNK_LOGITS // max(1, vocab_size))
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, 1 << (fitting.bit_length() - 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRule:
    """What a model does to its head's output before the softmax.

    Example:
        >>> LogitRule(softcap=30.0).apply(torch.tensor([0.0, 1e4])).tolist()
        [0.0, 30.0]
    """

    scale: float = 1.0
    """Factor on the head's output (Cohere, Granite)."""
    softcap: float | None = None
    """c in c·tanh(z/c), after the scale (Gemma 2)."""

    @property
    def changes_logits(self) -> bool:
        """Whether it does anything."""
        return self.scale != 1.0 or self.softcap is not None

    def apply(self, raw: Tensor) -> Tensor:
        """Turn a head's output into logits, without a gradient.

        Args:
            raw: (..., V) floating point. Not modified.

        Returns:
            (..., V), at least float32.
        """
        z = raw.detach().to(_wide(raw.dtype), copy=True).mul_(self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Differentiate `apply`, from its result.

        Args:
            logits: (..., V) what `apply` returned. Not modified.

        Returns:
            d logits / d raw: (..., V), or one number without a cap.
        """
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1).mul_(self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLoss:
    """Losses of S tokens."""

    total: Tensor
    """() their sum, float32 (float64 for float64 inputs). Differentiable."""
    tokens: Tensor
    """(S,) each token's, same dtype; zero where ignored. Not differentiable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    rule: LogitRule
    smoothing: float
    ignore_index: int | None
    chunk: int
    gradient: bool


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    rule: LogitRule | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = IGNORE,
    chunk_tokens: int | None = None,
) -> HeadLoss:
    """Cross-entropy of a head's predictions, without ever holding all logits.

    An `nn.Linear` is read directly; any other module (NF4, LoRA, one with hooks) is called
    once per chunk and differentiated by autograd, chunk by chunk.

    Args:
        head: maps (C, H) to (C, V). Its parameters that require a gradient get one, summed
            over chunks in float32.
        hidden: (S, H) bfloat16, float16, float32 or float64. Not modified.
        targets: (S,) int64, class to predict.
        rule: what happens between the head's output and the softmax.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
        ignore_index: target of tokens that do not count; None when all of them count.
        chunk_tokens: tokens at a time; None for `chunk_tokens_for` the vocabulary.

    Returns:
        The sum, and each token's loss. The softmax is taken in float32.

    Raises:
        ShapeError: hidden states and targets are not (S, H) and (S,).

    Example:
        >>> head = nn.Linear(8, 16)
        >>> hidden, targets = torch.randn(5, 8), torch.tensor([1, 2, -100, 4, 5])
        >>> loss = head_loss(head, hidden, targets, chunk_tokens=2)
        >>> wanted = nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
        >>> torch.allclose(loss.total, wanted)
        True
    """
    _check(hidden, targets, label_smoothing, chunk_tokens)
    plain = is_plain_linear(head)
    parameters: tuple[Tensor | None, ...]
    if plain:
        parameters = (head.weight, head.bias)  # type: ignore[assignment]
    else:
        parameters = tuple(p for p in head.parameters() if p.requires_grad)
    vocab_size = int(getattr(head, "out_features", 1 << 17))
    options = _Options(
        rule=rule or LogitRule(),
        smoothing=label_smoothing,
        ignore_index=ignore_index,
        chunk=chunk_tokens or chunk_tokens_for(vocab_size),
        gradient=torch.is_grad_enabled(),
    )
    total, tokens = _ChunkedLoss.apply(
        hidden, targets, options, None if plain else head, *parameters
    )
    return HeadLoss(total=total, tokens=tokens)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is W·x + b and nothing else, so that its weight may be read directly.

    Args:
        head: any module.

    Returns:
        False for subclasses, patched and hooked modules.

    Example:
        >>> is_plain_linear(nn.Linear(2, 3)), is_plain_linear(nn.Identity())
        (True, False)
    """
    hooked = bool(head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    patched = "forward" in vars(head)
    return type(head) is nn.Linear and not (hooked or patched)


def _check(hidden: Tensor, targets: Tensor, smoothing: float, chunk: int | None) -> None:
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ShapeError(
            "the loss head needs hidden states (S, H) and targets (S,), got "
            f"{tuple(hidden.shape)} and {tuple(targets.shape)}. Flatten batch and sequence first."
        )
    assert 0.0 <= smoothing < 1.0, smoothing
    assert chunk is None or chunk > 0, chunk


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _losses(raw: Tensor, targets: Tensor, options: _Options) -> tuple[Tensor, Tensor | None]:
    """Losses of a chunk, and their sum's gradient with respect to the head's output.

    Args:
        raw: (C, V) the head's output. Not modified.
        targets: (C,) int64.
        options: how.

    Returns:
        (C,) losses; (C, V) gradient in the dtype of raw, or None if not asked for.
    """
    wide, share = _wide(raw.dtype), options.smoothing
    slope: Tensor | float = 1.0
    logits = raw
    if options.rule.changes_logits:
        logits = options.rule.apply(raw)
        slope = options.rule.slope(logits) if options.gradient else 1.0
    log_p = torch.log_softmax(logits, dim=-1, dtype=wide)
    del logits
    ignored = None if options.ignore_index is None else targets == options.ignore_index
    wanted = (targets if ignored is None else targets.masked_fill(ignored, 0)).unsqueeze(1)
    chosen = log_p.gather(1, wanted)
    losses = chosen.squeeze(1) * (share - 1.0)
    if share:
        losses = losses - share * log_p.mean(dim=1)
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0.0)
    if not options.gradient:
        return losses, None
    # p minus the target distribution; at the target, p - 1 is expm1(log p): exact near p = 1.
    exact = bool(share) or options.rule.changes_logits
    gradient = torch.exp(log_p, out=log_p if exact else torch.empty_like(raw))
    if share:
        gradient.sub_(share / raw.shape[1])
    at_target = torch.expm1(chosen).add_(share - share / raw.shape[1])
    gradient.scatter_(1, wanted, at_target.to(gradient.dtype))
    if options.rule.changes_logits:
        gradient.mul_(slope)
    if ignored is not None:
        gradient.masked_fill_(ignored.unsqueeze(1), 0.0)
    return losses, gradient.to(raw.dtype)


class _Sums:
    """Gradients of parameters, added up over chunks in float32."""

    def __init__(self, parameters: tuple[Tensor | None, ...], wanted: tuple[bool, ...]) -> None:
        self.parameters = parameters
        self.sums = [
            torch.zeros_like(p, dtype=_wide(p.dtype)) if p is not None and needed else None
            for p, needed in zip(parameters, wanted, strict=True)
        ]

    def __bool__(self) -> bool:
        return any(s is not None for s in self.sums)

    def add(self, index: int, gradient: Callable[[], Tensor]) -> None:
        """Add one parameter's part, computed only if it is wanted."""
        total = self.sums[index]
        if total is not None:
            total.add_(gradient())

    def cast(self) -> list[Tensor | None]:
        """The sums in the parameters' dtypes; the float32 ones are let go."""
        done: list[Tensor | None] = []
        for i, parameter in enumerate(self.parameters):
            total, self.sums[i] = self.sums[i], None
            done.append(None if total is None or parameter is None else total.to(parameter.dtype))
        return done


class _LinearChunks:
    """Applies a weight and bias to chunks, and takes gradients back, without autograd."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, sums: _Sums) -> None:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        self.weight = weight.to(self.dtype) if autocast else weight
        self.bias = bias.to(self.dtype) if autocast and bias is not None else bias
        self.device, self.sums = device, sums

    def __call__(
        self, chunk: Tensor, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        """Losses (C,) of a chunk (C, H), and its gradient (C, H)."""
        with torch.autocast(self.device, enabled=False):
            x = chunk.to(self.dtype)
            raw = nn.functional.linear(x, self.weight, self.bias)
            losses, gradient = _losses(raw, targets, options)
            del raw
            if gradient is None:
                return losses, None
            self.sums.add(0, lambda: gradient.T @ x)
            self.sums.add(1, lambda: gradient.sum(dim=0, dtype=_wide(gradient.dtype)))
            return losses, gradient @ self.weight


class _ModuleChunks:
    """Applies any head to chunks, each differentiated by autograd before the next one."""

    def __init__(self, head: nn.Module, sums: _Sums) -> None:
        self.head, self.sums = head, sums

    def __call__(
        self, chunk: Tensor, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        """Losses (C,) of a chunk (C, H), and its gradient (C, H)."""
        with torch.set_grad_enabled(options.gradient):
            x = chunk.detach().requires_grad_(options.gradient)
            raw = self.head(x)
        losses, gradient = _losses(raw.detach(), targets.to(raw.device), options)
        if gradient is None:
            return losses, None
        parameters = [p for p in self.sums.parameters if p is not None]
        d_chunk, *found = torch.autograd.grad(raw, [x, *parameters], gradient, allow_unused=True)
        for i, part in enumerate(found):
            if part is not None:
                self.sums.add(i, part.detach)
        return losses, d_chunk


class _ChunkedLoss(torch.autograd.Function):
    """(hidden, parameters) to (sum, losses); saves gradients, no logits and no hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        options: _Options,
        head: nn.Module | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Go through the chunks; `head` is None for a weight and a bias."""
        wanted = tuple(needed and options.gradient for needed in ctx.needs_input_grad[4:])
        sums = _Sums(parameters, wanted)
        if not (sums or ctx.needs_input_grad[0]):
            options = replace(options, gradient=False)
        apply: _LinearChunks | _ModuleChunks
        if head is not None:
            apply = _ModuleChunks(head, sums)
        else:
            weight, bias = parameters
            assert weight is not None
            apply = _LinearChunks(hidden, weight, bias, sums)
        keep = options.gradient and ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if keep else None
        tokens = hidden.new_empty(hidden.shape[0], dtype=_wide(hidden.dtype))
        for start in range(0, hidden.shape[0], options.chunk):
            rows = slice(start, start + options.chunk)
            losses, gradient = apply(hidden[rows], targets[rows], options)
            tokens[rows] = losses
            if d_hidden is not None and gradient is not None:
                d_hidden[rows] = gradient
        ctx.chunk = options.chunk
        ctx.save_for_backward(d_hidden, *sums.cast())
        ctx.mark_non_differentiable(tokens)
        return tokens.sum(), tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply by the gradient of the sum, in float32 and a chunk at a time."""
        found = (_scaled(g, outer[0], ctx.chunk) for g in ctx.saved_tensors)
        d_hidden, *rest = found
        return (d_hidden, None, None, None, *rest)


def _scaled(gradient: Tensor | None, factor: Tensor, rows: int) -> Tensor | None:
    """A gradient times a scalar, rounded once; no float32 copy of the whole of it exists."""
    if gradient is None:
        return None
    out = torch.empty_like(gradient)
    pairs = zip(gradient.split(rows), out.split(rows), strict=True) if gradient.dim() else ()
    for part, into in pairs:
        into.copy_(part.to(factor.dtype) * factor)
    return out if gradient.dim() else (gradient.to(factor.dtype) * factor).to(gradient.dtype)
