"""How far a model is from the one it was made from, on the same tokens.

A merge or a quantization should be judged by what it does to predictions. For
every token that counts (label not -100) the two models' distributions are
compared: KL(reference ‖ other) in nats, whether the most likely token is the same,
and the loss of either model. A KL of 0.001 is invisible; 0.1 is a different model.

Vocabularies are large: 8 x 2,048 positions of 128k classes are 8 GB in float32,
for each model. Only one batch of logits per model exists at a time, and the
float32 distributions only for `CHUNK_TOKENS` positions at a time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.core.errors import DataError

CHUNK_TOKENS = 512
"""Positions whose distributions are in memory at a time."""
IGNORED = -100
"""Label of a position that does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """Two models' predictions compared, as means over tokens.

    Example:
        >>> str(Deviation(kl=0.0012, top1_agreement=0.995, loss_reference=1.5, loss_other=1.51,
        ...     tokens=2000))
        'KL 0.00120, same top token 99.5%, loss 1.5000 -> 1.5100 (2000 tokens)'
    """

    kl: float
    """KL(reference ‖ other), nats per token."""
    top1_agreement: float
    """Share of tokens with the same most likely prediction."""
    loss_reference: float
    """Cross entropy of the reference with the labels, nats per token."""
    loss_other: float
    """The same of the other model."""
    tokens: int
    """Tokens compared."""

    def __str__(self) -> str:
        """One line for a terminal or a report."""
        return (
            f"KL {self.kl:.5f}, same top token {self.top1_agreement:.1%}, "
            f"loss {self.loss_reference:.4f} -> {self.loss_other:.4f} ({self.tokens} tokens)"
        )


def compare(
    reference_model: nn.Module,
    other_model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
) -> Deviation:
    """Compare two causal language models on the tokens that carry labels.

    Args:
        reference_model: called with input_ids and attention_mask; returns `.logits`
            (B, T, V). Put into evaluation mode while it is compared.
        other_model: the same, of the same vocabulary; may live on another device.
        batches: each with input_ids (B, T), labels (B, T) with -100 where a token does
            not count, and optionally attention_mask (B, T) and position_ids.

    Returns:
        Means over all labelled tokens of all batches.

    Raises:
        DataError: no token has a label, or the vocabularies differ.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> compare(model, model, [{"input_ids": ids, "labels": ids}]).top1_agreement
        1.0
    """
    totals = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    modes = [(model, model.training) for model in (reference_model, other_model)]
    try:
        for model, _ in modes:
            model.eval()
        for batch in batches:
            labels = batch["labels"][:, 1:].reshape(-1)
            kept = (labels != IGNORED).nonzero().squeeze(1)
            if kept.numel():
                with torch.no_grad():
                    reference = _logits(reference_model, batch, kept)
                    other = _logits(other_model, batch, kept).to(reference.device)
                totals += _sums(reference, other, labels[kept.to(labels.device)])
                tokens += kept.numel()
    finally:
        for model, training in modes:
            model.train(training)
    if not tokens:
        raise DataError(
            "no token of the batches has a label, so there is nothing to compare. Labels must be "
            "token ids where a prediction counts and -100 elsewhere."
        )
    kl, agreement, loss_reference, loss_other = (totals / tokens).tolist()
    return Deviation(
        kl=max(kl, 0.0),  # a sum of roundings may end just below zero
        top1_agreement=agreement,
        loss_reference=loss_reference,
        loss_other=loss_other,
        tokens=tokens,
    )


def _logits(model: nn.Module, batch: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """Logits of the positions that predict a labelled token, (tokens, V), in the model's dtype."""
    device = next(model.parameters()).device
    inputs = {
        name: batch[name].to(device)
        for name in ("input_ids", "attention_mask", "position_ids")
        if batch.get(name) is not None
    }
    logits = model(**inputs).logits[:, :-1]
    return logits.reshape(-1, logits.shape[-1])[kept.to(device)]


def _sums(reference: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """KL, agreement and both losses summed over tokens, float64 (4,)."""
    if reference.shape != other.shape:
        raise DataError(
            f"the models have vocabularies of {reference.shape[-1]} and {other.shape[-1]} tokens; "
            "only models of one tokenizer can be compared."
        )
    totals = torch.zeros(4, dtype=torch.float64)
    labels = labels.to(reference.device)
    for start in range(0, labels.numel(), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        ours = F.log_softmax(reference[rows].float(), dim=-1)
        theirs = F.log_softmax(other[rows].float(), dim=-1)
        kl = F.kl_div(theirs, ours, log_target=True, reduction="sum")
        same = (ours.argmax(-1) == theirs.argmax(-1)).sum()
        losses = (F.nll_loss(log, labels[rows], reduction="sum") for log in (ours, theirs))
        totals += torch.stack([part.double().cpu() for part in (kl, same, *losses)])
    return totals
