"""The loss head: output projection and cross-entropy, a chunk of tokens at a time.

Logits are the largest tensor of a training step: 8,192 tokens of 128k classes are 2 GB in
bfloat16 and 4 GB in float32, several times over once the softmax and its gradient are
counted. None of it is needed afterwards. So the head is applied to a chunk of tokens, the
loss is taken and the gradient put in the place of the logits (`ops/cross_entropy`), and both
are dropped before the next chunk: what stays is the gradient of the hidden states, (S, H),
and in a trained head that of its parameters. The backward pass only multiplies these by the
incoming scalar.

The gradient kept is that of the *sum* of the losses. Dividing by the number of tokens, and
float16's loss scale, come in through the scalar, in float32, so nothing small is rounded away.

A chunk's size follows from the vocabulary alone, never from the memory that happens to be
free: the same batch gives the same bits on every machine of a kind. Tokens that do not count
are masked, not removed, and nothing is read back: shapes decide all that is launched, and the
host never waits.

An NF4 head is decoded once per pass, not once per chunk: decoding takes as long as a third of
a chunk's two products. The decoded weight, (V, H), lives from the first chunk to the last, when
no layer holds anything but what it saved; it is what the product of an NF4 linear without a
kernel of its own makes for every call.

Memory beyond hidden states and results: O(chunk x V). Truth: `F.cross_entropy` on all logits.
Idea: arXiv:2411.09009 (never hold all logits), arXiv:2410.10989 (gradient in the forward).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kit.core.errors import ShapeError
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.autocast import autocast, autocast_dtype
from qlora_kit.ops.cross_entropy.op import cross_entropy, cross_entropy_
from qlora_kit.ops.cross_entropy.reference import logits_of
from qlora_kit.ops.layout import arithmetic_dtype

IGNORE = -100
"""Label of a position that does not count."""

CHUNK_LOGITS = 1 << 27
"""Logits that exist at a time: 256 MiB in 16 bits, and as much again where float32 is needed."""

SMALLEST_CHUNK, LARGEST_CHUNK = 128, 4096
"""Tokens: below, a GPU's matrix units idle; above, nothing gets faster."""

_ROW_MULTIPLE = 64
"""Rows of logits start at multiples of this many values, whatever the vocabulary."""

_WEIGHT_ROWS = 16384
"""Of a trained head's gradient that are computed at a time, before they are added in float32."""

_SCALED_ROWS = 4096
"""Of a gradient that are scaled at a time: on a CPU these exist in float32."""


def chunk_tokens_for(vocab_size: int) -> int:
    """Tokens whose logits exist at a time.

    Args:
        vocab_size: V.

    Returns:
        The power of two that keeps a chunk within `CHUNK_LOGITS`, between 128 and 4,096.

    Example:
        >>> chunk_tokens_for(32_000), chunk_tokens_for(128_256), chunk_tokens_for(262_144)
        (4096, 1024, 512)
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
    """Factor on the head's output, above zero (Cohere, Granite)."""
    softcap: float | None = None
    """c in c·tanh(z/c), after the scale (Gemma 2)."""

    def apply(self, raw: Tensor) -> Tensor:
        """Turn a head's output into logits, without a gradient.

        Args:
            raw: (..., V) floating point. Not modified.

        Returns:
            (..., V), at least float32.
        """
        return logits_of(raw.detach(), self.scale, self.softcap)


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

    def losses(self, raw: Tensor, targets: Tensor, out: Tensor | None = None) -> Tensor:
        """Losses (C,) of a head's output (C, V), which their gradient replaces if it is wanted."""
        function = cross_entropy_ if self.gradient else cross_entropy
        return function(
            raw,
            targets,
            scale=self.rule.scale,
            softcap=self.rule.softcap,
            label_smoothing=self.smoothing,
            ignore_index=self.ignore_index,
            losses=out,
        )


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

    The weight of an `nn.Linear` or an `NF4Linear` is read directly; any other module (LoRA, one
    with hooks) is called once per chunk and differentiated by autograd, chunk by chunk.

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
        weight = head.weight if isinstance(head, nn.Linear) else None
        parameters = (weight, head.bias)  # type: ignore[assignment]
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
    targets = targets.contiguous()
    total, tokens = _ChunkedLoss.apply(hidden, targets, options, head, *parameters)
    return HeadLoss(total=total, tokens=tokens)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is W·x + b and nothing else, so that its weight may be read directly.

    Args:
        head: any module.

    Returns:
        True for an `nn.Linear` and an `NF4Linear`; False for their subclasses, and for patched
        and hooked modules.

    Example:
        >>> is_plain_linear(nn.Linear(2, 3)), is_plain_linear(nn.Identity())
        (True, False)
    """
    hooked = bool(head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    patched = "forward" in vars(head)
    return type(head) in (nn.Linear, NF4Linear) and not (hooked or patched)


def _check(hidden: Tensor, targets: Tensor, smoothing: float, chunk: int | None) -> None:
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ShapeError(
            "the loss head needs hidden states (S, H) and targets (S,), got "
            f"{tuple(hidden.shape)} and {tuple(targets.shape)}. Flatten batch and sequence first."
        )
    assert 0.0 <= smoothing < 1.0, smoothing
    assert chunk is None or chunk > 0, chunk


class _Sums:
    """Gradients of parameters, added up over chunks in float32."""

    def __init__(self, parameters: tuple[Tensor | None, ...], wanted: tuple[bool, ...]) -> None:
        self.parameters = parameters
        self.sums = [
            torch.zeros_like(p, dtype=arithmetic_dtype(p)) if p is not None and needed else None
            for p, needed in zip(parameters, wanted, strict=True)
        ]

    def __bool__(self) -> bool:
        return any(s is not None for s in self.sums)

    def wants(self, index: int) -> bool:
        """Whether one parameter needs a gradient."""
        return self.sums[index] is not None

    def add(self, index: int, part: Tensor) -> None:
        """Add to one parameter's, if it is wanted."""
        total = self.sums[index]
        if total is not None:
            total.add_(part)

    def add_product(self, index: int, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ·right (V, H) to one parameter's, some rows at a time, if it is wanted."""
        total = self.sums[index]
        if total is None:
            return
        for start in range(0, total.shape[0], _WEIGHT_ROWS):
            rows = slice(start, start + _WEIGHT_ROWS)
            total[rows].add_(left[:, rows].T @ right)

    def cast(self) -> list[Tensor | None]:
        """The sums in the parameters' dtypes; the float32 ones are let go."""
        done: list[Tensor | None] = []
        for i, parameter in enumerate(self.parameters):
            total, self.sums[i] = self.sums[i], None
            done.append(None if total is None or parameter is None else total.to(parameter.dtype))
        return done


class _LinearChunks:
    """Applies a weight and bias to chunks, and takes gradients back, without autograd."""

    def __init__(self, head: nn.Module, hidden: Tensor, sums: _Sums, options: _Options) -> None:
        """Prepare the weight, and room for a chunk of logits."""
        wanted = None if hidden.dtype == torch.float64 else autocast_dtype(hidden.device)
        cast = wanted is not None
        self.dtype = wanted or hidden.dtype
        self.weight: Tensor
        self.bias: Tensor | None = head.bias  # type: ignore[assignment]
        if isinstance(head, NF4Linear):
            self.weight = head.dequantize(self.dtype)
        else:  # without autocast, a dtype other than that of the states is an error, as ever
            assert isinstance(head, nn.Linear)
            self.weight = head.weight.to(self.dtype) if cast else head.weight
        if self.bias is not None and (cast or isinstance(head, NF4Linear)):
            self.bias = self.bias.to(self.dtype)
        self.sums, self.options = sums, options
        v, rows = self.weight.shape[0], min(options.chunk, hidden.shape[0])
        width = -(-v // _ROW_MULTIPLE) * _ROW_MULTIPLE
        self.logits = hidden.new_empty((rows, width), dtype=self.dtype)[:, :v]

    def __call__(
        self, chunk: Tensor, targets: Tensor, losses: Tensor, d_chunk: Tensor | None
    ) -> None:
        """Write the losses (C,) of a chunk (C, H), and its gradient (C, H)."""
        with autocast(chunk.device, None):
            self._apply(chunk, targets, losses, d_chunk)

    def _apply(
        self, chunk: Tensor, targets: Tensor, losses: Tensor, d_chunk: Tensor | None
    ) -> None:
        x, raw = chunk.to(self.dtype), self.logits[: chunk.shape[0]]
        if self.bias is None:
            torch.mm(x, self.weight.T, out=raw)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=raw)
        self.options.losses(raw, targets, losses)  # from here on `raw` is the gradient
        if not self.options.gradient:
            return
        self.sums.add_product(0, raw, x)
        if self.sums.wants(1):
            self.sums.add(1, raw.sum(dim=0, dtype=arithmetic_dtype(raw)))
        if d_chunk is None:
            return
        if d_chunk.dtype == raw.dtype:
            torch.mm(raw, self.weight, out=d_chunk)
        else:
            d_chunk.copy_(raw @ self.weight)


class _ModuleChunks:
    """Applies any head to chunks, each differentiated by autograd before the next one."""

    def __init__(self, head: nn.Module, _hidden: Tensor, sums: _Sums, options: _Options) -> None:
        """Keep what every chunk needs."""
        self.head, self.sums, self.options = head, sums, options

    def __call__(
        self, chunk: Tensor, targets: Tensor, losses: Tensor, d_chunk: Tensor | None
    ) -> None:
        """Write the losses (C,) of a chunk (C, H), and its gradient (C, H)."""
        options = self.options
        with torch.set_grad_enabled(options.gradient):
            x = chunk.detach().requires_grad_(options.gradient)
            raw = self.head(x)
        targets = targets.to(raw.device)
        if not options.gradient:
            losses.copy_(options.losses(raw.detach().contiguous(), targets))
            return
        # A copy: the head may have handed out its input, or kept its output for the backward.
        gradient = raw.detach().clone(memory_format=torch.contiguous_format)
        losses.copy_(options.losses(gradient, targets))
        parameters = [p for p in self.sums.parameters if p is not None]
        found_x, *found = torch.autograd.grad(raw, [x, *parameters], gradient, allow_unused=True)
        for i, part in enumerate(found):
            if part is not None:
                self.sums.add(i, part.detach())
        if d_chunk is not None:
            d_chunk.copy_(found_x)


class _ChunkedLoss(torch.autograd.Function):
    """(hidden, parameters) to (sum, losses); saves gradients, no logits and no hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        options: _Options,
        head: nn.Module,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Go through the chunks."""
        wanted = tuple(needed and options.gradient for needed in ctx.needs_input_grad[4:])
        sums = _Sums(parameters, wanted)
        if not (sums or ctx.needs_input_grad[0]):
            options = replace(options, gradient=False)
        keep = options.gradient and ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if keep else None
        tokens = hidden.new_empty(hidden.shape[0], dtype=arithmetic_dtype(hidden))
        chunks = _LinearChunks if is_plain_linear(head) else _ModuleChunks
        apply = chunks(head, hidden, sums, options)
        for start in range(0, hidden.shape[0], options.chunk):
            rows = slice(start, start + options.chunk)
            d_chunk = None if d_hidden is None else d_hidden[rows]
            apply(hidden[rows], targets[rows], tokens[rows], d_chunk)
        ctx.save_for_backward(d_hidden, *sums.cast())
        ctx.mark_non_differentiable(tokens)
        return tokens.sum(), tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply by the gradient of the sum, in float32 and a chunk at a time."""
        d_hidden, *rest = (_scaled(gradient, outer[0]) for gradient in ctx.saved_tensors)
        return (d_hidden, None, None, None, *rest)


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """A gradient times a scalar, rounded once; no float32 copy of the whole of it exists."""
    if gradient is None:
        return None
    out = torch.empty_like(gradient)
    wide = factor.reshape((1,) * gradient.dim())  # as many dimensions: its dtype counts
    if not gradient.dim():
        return torch.mul(gradient, wide, out=out)
    for part, into in zip(gradient.split(_SCALED_ROWS), out.split(_SCALED_ROWS), strict=True):
        torch.mul(part, wide, out=into)
    return out
