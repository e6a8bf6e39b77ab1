"""The language-model loss, at the positions that count and nowhere else.

A batch of (B, T) tokens asks a plain model for (B, T, V) logits, usually in
float32, of which fine-tuning on completions uses a few per row. Here the output
head sees only the hidden states whose next token has a label: a forward
pre-hook on the head selects them, so the model's own code after the head (soft
caps, logit scales) runs unchanged on (1, S, V) instead of (B, T, V), and every
architecture whose head is a module is covered without knowing its parts. Where
the head is not such a module, the model's own loss is taken and that is logged.

The cross-entropy runs in float32 in slices of `SLICE` positions, which the
backward recomputes, so no float32 copy of all logits exists at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora_kit.core.log import log_once

IGNORE = -100
"""Label of a position that does not count."""

SLICE = 1024
"""Positions whose logits are float32 at the same time."""


@dataclass(frozen=True, slots=True)
class SelectedLogits:
    """Logits at the S positions of a batch whose next token has a label."""

    logits: Tensor
    """(S, V), in the model's compute dtype."""
    targets: Tensor
    """(S,) int64, the token to predict."""
    rows: Tensor
    """(S,) int64, the batch row each position belongs to; ascending."""
    positions: Tensor
    """(S,) int64, its column; the target is the token at the next one."""


def label_mask(labels: Tensor) -> Tensor:
    """Mark the positions whose hidden state predicts a token that counts.

    Args:
        labels: (B, T) int64, `IGNORE` where a token does not count.

    Returns:
        (B, T) bool; position t is True when labels[:, t + 1] counts.

    Example:
        >>> label_mask(torch.tensor([[-100, -100, 7, 8]])).int().tolist()
        [[0, 1, 1, 0]]
    """
    return F.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def count_targets(labels: Tensor) -> Tensor:
    """Count the predictions that `label_mask` selects, on the labels' device.

    Args:
        labels: (B, T) int64.

    Returns:
        () int64.

    Example:
        >>> count_targets(torch.tensor([[5, -100, 7, 8]])).item()
        2
    """
    return (labels[:, 1:] != IGNORE).sum()


class _HeadSelector:
    """Forward pre-hook that hands the head only the selected hidden states."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.calls = 0

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self.calls += 1
        hidden = inputs[0]
        if hidden.shape[:2] != self.mask.shape:
            self.calls = -1  # not the (B, T, H) of this batch: leave it alone, use the model's loss
            return None
        return (hidden[self.mask.to(hidden.device)].unsqueeze(0), *inputs[1:])


def selectable_head(model: PreTrainedModel) -> nn.Module | None:
    """Find the output head that can be given selected positions only.

    Args:
        model: a causal language model.

    Returns:
        The module that maps hidden states to logits, or None when the model has
        no such module or adds a routing loss only its own loss code knows.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> selectable_head(tiny) is tiny.lm_head
        True
    """
    if getattr(model.config, "output_router_logits", False):
        return None
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def selected_logits(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    *,
    forward: Callable[..., Any] | None = None,
) -> SelectedLogits | None:
    """Run the model and keep the logits that predict a counted token.

    Args:
        model: a causal language model.
        inputs: a collated batch with `input_ids` and `labels` (B, T), and whatever
            else the model takes. Not modified.
        forward: how to call the model when something wraps it (data parallelism).

    Returns:
        The logits, their targets and rows; None when this architecture's head
        cannot be given selected positions (use the model's own loss then).

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
        >>> selected_logits(tiny, batch).logits.shape
        torch.Size([2, 16])
    """
    head = selectable_head(model)
    if head is None:
        return None
    labels = inputs["labels"]
    mask = label_mask(labels)
    selector = _HeadSelector(mask)
    handle = head.register_forward_pre_hook(selector)
    try:
        outputs = (forward or model)(**{k: v for k, v in inputs.items() if k != "labels"})
    finally:
        handle.remove()
    if selector.calls != 1:
        return None
    logits: Tensor = outputs.logits[0]
    rows, positions = mask.to(logits.device).nonzero(as_tuple=True)
    targets = labels.to(logits.device)[rows, positions + 1]
    return SelectedLogits(logits=logits, targets=targets, rows=rows, positions=positions)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in float32, a slice of positions at a time.

    Args:
        logits: (S, V), any floating dtype.
        targets: (S,) int64.

    Returns:
        (S,) float32, in nats.

    Example:
        >>> token_losses(torch.zeros(2, 4), torch.tensor([0, 3])).tolist()
        [1.3862943649291992, 1.3862943649291992]
    """
    pieces = []
    for part, wanted in zip(logits.split(SLICE), targets.split(SLICE), strict=True):
        if part.requires_grad and part.dtype != torch.float32:
            pieces.append(checkpoint(_cross_entropy, part, wanted, use_reentrant=False))
        else:
            pieces.append(_cross_entropy(part, wanted))
    return torch.cat(pieces) if pieces else logits.new_zeros(0, dtype=torch.float32)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def causal_lm_loss(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    num_items: Tensor | int | None = None,
    *,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Mean cross-entropy over the tokens that count.

    Args:
        model: a causal language model.
        inputs: a collated batch with `input_ids` and `labels` (B, T). Not modified.
        num_items: divide the sum by this instead of by the batch's own count, so
            that accumulated batches weigh every token alike.
        forward: how to call the model when something wraps it (data parallelism).

    Returns:
        () float32; zero (with a gradient of zero) when no token counts.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
        >>> torch.allclose(causal_lm_loss(tiny.eval(), batch), tiny(**batch).loss)
        True
    """
    selected = selected_logits(model, inputs, forward=forward)
    if selected is None:
        log_once(
            f"{type(model).__name__}: the head cannot be given selected positions; using the "
            "model's own loss over all positions."
        )
        if num_items is None:
            num_items = count_targets(inputs["labels"])
        loss: Tensor = (forward or model)(**inputs, num_items_in_batch=num_items).loss
        return loss
    total = token_losses(selected.logits, selected.targets).sum()
    if num_items is None:
        num_items = max(1, selected.targets.numel())
    return total / num_items
