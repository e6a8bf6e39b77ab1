"""Held-out batches: losses summed over tokens, no gradients, no logits kept; and their rows.

The Trainer uses this while it trains, the evaluator before and after.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_kit.nn.loss_head import IGNORE, LogitRule
from qlora_kit.step.head_input import HeadInput, head_input, without_targets
from qlora_kit.train.data.tokenized import TokenizedSet
from qlora_kit.train.metrics import perplexity

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(slots=True)
class LossTotals:
    """Sums over held-out rows."""

    loss_sum: float = 0.0
    """Summed cross-entropy: over tokens, or over rows of a classifier."""
    count: int = 0
    """Tokens that count; rows of a classifier."""
    rows: int = 0
    """Rows seen."""
    correct: int | None = None
    """Rightly classified rows; None for language models."""

    def metrics(self) -> dict[str, float]:
        """Means, under the names the Trainer logs."""
        loss = self.loss_sum / max(1, self.count)
        if self.correct is not None:
            return {"loss": loss, "accuracy": self.correct / max(1, self.rows)}
        return {"loss": loss, "perplexity": perplexity(loss)}

    def summed(self, accelerator: "Accelerator") -> "LossTotals":
        """Add up the totals of all processes."""
        own = [self.loss_sum, self.count, self.rows, self.correct or 0]
        total = accelerator.reduce(
            torch.tensor(own, dtype=torch.float64, device=accelerator.device), "sum"
        ).tolist()
        correct = None if self.correct is None else int(total[3])
        return LossTotals(total[0], int(total[1]), int(total[2]), correct)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors; other arguments (`use_cache`) pass as they are.

    Args:
        batch: arguments of a model's forward.
        device: where the model computes.

    Returns:
        A new dictionary.

    Example:
        >>> to_device({"use_cache": False}, torch.device("cpu"))
        {'use_cache': False}
    """
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def language_model_losses(
    model: PreTrainedModel, batch: dict[str, Any]
) -> tuple[Tensor, HeadInput]:
    """Run a language model on one batch, on the model's device.

    Args:
        model: a causal language model.
        batch: with `input_ids` and `labels`.

    Returns:
        (S,) float32 cross-entropy of each counted token, and what the head made it from.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
        >>> language_model_losses(tiny, batch)[0].shape
        torch.Size([2])
    """
    # Exactly the positions that count, read off the labels: their number is wanted as well.
    batch = {**without_targets(batch), "labels": batch["labels"]}
    selected = head_input(model, batch)
    if selected is None:  # no reachable head: the model's own logits, all of them
        output = model(**without_targets(batch))
        mask = batch["labels"][:, 1:] != IGNORE
        rows, positions = mask.nonzero(as_tuple=True)
        targets = batch["labels"][:, 1:][mask]
        selected = HeadInput(
            states=output.logits[:, :-1][mask],
            head=nn.Identity(),
            rule=LogitRule(),
            targets=targets,
            rows=rows,
            positions=positions,
        )
    return selected.losses().tokens, selected


def loss_totals(
    model: PreTrainedModel, batches: Iterable[dict[str, Any]], *, causal: bool = True
) -> LossTotals:
    """Measure the loss of collated batches, without gradients and without keeping logits.

    Args:
        model: evaluation mode is set and restored.
        batches: tensors with `labels`.
        causal: False for a sequence classifier.

    Returns:
        Sums, weighted by token (by row, for a classifier).

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
        >>> loss_totals(tiny, [batch]).count
        2
    """
    totals = LossTotals(correct=None if causal else 0)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                batch = to_device(batch, model.device)
                totals.rows += batch["labels"].shape[0]
                if causal:
                    losses, _ = language_model_losses(model, batch)
                else:
                    losses, predicted = classify_batch(model, batch)
                    right = int((predicted == batch["labels"]).sum())
                    totals.correct = (totals.correct or 0) + right
                totals.loss_sum += float(losses.double().sum())
                totals.count += losses.numel()
    finally:
        model.train(was_training)
    return totals


def classify_batch(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a sequence classifier on one batch, on the model's device.

    Args:
        model: a sequence classifier.
        batch: with `labels` (B,) int64.

    Returns:
        (B,) float32 cross-entropy, and (B,) int64 the likeliest class.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertForSequenceClassification(BertConfig(
        ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16))
        >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([1])}
        >>> classify_batch(tiny, batch)[1].shape
        torch.Size([1])
    """
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    return F.cross_entropy(logits, batch["labels"], reduction="none"), logits.argmax(dim=-1)


def sample_rows(count: int, wanted: int) -> list[int]:
    """Pick rows spread evenly over a set.

    Args:
        count: rows there are.
        wanted: rows to pick.

    Returns:
        Ascending row numbers, at most `count`.

    Example:
        >>> sample_rows(9, 3), sample_rows(2, 5), sample_rows(9, 1)
        ([0, 4, 8], [0, 1], [0])
    """
    wanted = min(count, wanted)
    if wanted <= 1:
        return list(range(wanted))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def example_rows(data: TokenizedSet) -> list[int]:
    """Find the row each of a set's examples was made from.

    Rows that do not end with an answer have no example, so the two can differ in length.

    Args:
        data: held-out rows.

    Returns:
        One ascending row number per example.

    Example:
        >>> from types import SimpleNamespace as Namespace
        >>> class Rows(list):
        ...     examples = [Namespace(prompt_ids=(7, 8))]
        >>> example_rows(Rows([{"input_ids": [1, 2]}, {"input_ids": [7, 8, 9]}]))
        [1]
    """
    if len(data.examples) == len(data):
        return list(range(len(data)))
    found: list[int] = []
    for row in range(len(data)):
        if len(found) == len(data.examples):
            break
        prompt = list(data.examples[len(found)].prompt_ids)
        if data[row]["input_ids"][: len(prompt)] == prompt:
            found.append(row)
    return found
