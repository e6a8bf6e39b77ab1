"""The language-model loss: at the positions that count, normalised by their number.

`head_input.py` runs the model and takes the hidden states that predict a counted token;
`nn/loss_head.py` turns them into losses a chunk at a time and has the gradient at once.
Where a model's head cannot be reached, its own loss is taken, and that is logged.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.core.errors import ConfigError
from qlora_kit.core.log import log_once
from qlora_kit.nn.loss_head import IGNORE
from qlora_kit.step.head_input import head_input, without_targets


def count_targets(labels: Tensor) -> Tensor:
    """Count the predictions that `label_mask` selects, on the labels' device.

    Args:
        labels: (B, T) int64.

    Returns:
        () int64.

    Example:
        >>> import torch
        >>> count_targets(torch.tensor([[5, -100, 7, 8]])).item()
        2
    """
    return (labels[:, 1:] != IGNORE).sum()


def causal_lm_loss(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    num_items: Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Mean cross-entropy over the tokens that count, plus the model's router loss if it has one.

    Args:
        model: a causal language model.
        inputs: a collated batch with `input_ids` and `labels` (B, T); with `target_positions`
            (see `head_input.py`) as well, the host never waits for the GPU, but for the first
            batch of a model. Not modified.
        num_items: divide the sum by this instead of by the batch's own count, so
            that accumulated batches weigh every token alike. A tensor is not read back.
        label_smoothing: share of the target spread evenly over all tokens.
        forward: how to call the model when something wraps it (data parallelism).

    Returns:
        () float32; zero (with a gradient of zero) when no token counts.

    Raises:
        ConfigError: label smoothing, and a model whose head cannot be reached.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
        >>> torch.allclose(causal_lm_loss(tiny.eval(), batch), tiny(**batch).loss)
        True
    """
    selected = head_input(model, inputs, forward=forward)
    if selected is None:
        return _own_loss(model, inputs, num_items, label_smoothing, forward or model)
    if num_items is None:
        num_items = (selected.targets != IGNORE).sum().clamp_min(1)
    loss = selected.losses(label_smoothing).total / num_items
    if selected.router_loss is not None:
        loss = loss + selected.router_loss.to(loss.device)
    return loss


def _own_loss(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    num_items: Tensor | int | None,
    label_smoothing: float,
    forward: Callable[..., Any],
) -> Tensor:
    name = type(model).__name__
    if label_smoothing:
        raise ConfigError(
            f"label smoothing needs a model whose output head can be called by itself; {name} "
            "has none. Set label_smoothing_factor to 0 for this model."
        )
    log_once(
        f"{name}: the head cannot be given selected positions; using the model's own loss over "
        "all positions."
    )
    if num_items is None:
        num_items = count_targets(inputs["labels"])
    labels = {"labels": inputs["labels"]}
    loss: Tensor = forward(**without_targets(inputs), **labels, num_items_in_batch=num_items).loss
    return loss
