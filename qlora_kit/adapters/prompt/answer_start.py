"""Where the answer starts in every row: what an infix has to know.

With labels it is the first token that counts. They do not reach a model that only makes hidden
states, so the training step announces them around its call (`announced`); a caller who gives
`labels` to the model itself needs to do nothing. Without labels, in generation, the answer
starts behind the last token of the prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token that does not count."""

_labels: ContextVar[Tensor | None] = ContextVar("qlora_kit_labels", default=None)


@contextmanager
def announced(labels: Tensor | None) -> Iterator[None]:
    """Let whoever asks during a call know the labels of its batch.

    Args:
        labels: (B, T) int64 or None.

    Yields:
        Nothing.

    Example:
        >>> with announced(torch.tensor([[-100, 5]])):
        ...     announced_labels()
        tensor([[-100,    5]])
    """
    token = _labels.set(labels)
    try:
        yield
    finally:
        _labels.reset(token)


def announced_labels() -> Tensor | None:
    """The labels of the batch that is in the model now, if they were announced."""
    return _labels.get()


def last_prompt_token(labels: Tensor | None, mask: Tensor | None, length: int) -> Tensor:
    """Find the token whose hidden state predicts the first of the answer.

    Args:
        labels: (B, T) int64, `IGNORE` where a token does not count; None without an answer.
        mask: (B, T), 0 at padding, or None.
        length: T.

    Returns:
        (B, 1) int64, or (1, 1) where all rows are alike.

    Example:
        >>> last_prompt_token(torch.tensor([[-100, -100, 7, 8]]), None, 4)
        tensor([[1]])
        >>> last_prompt_token(None, torch.tensor([[1, 1, 0], [0, 1, 1]]), 3)
        tensor([[1],
                [2]])
    """
    if labels is not None:
        counts = labels != IGNORE
        first = counts.int().argmax(dim=1, keepdim=True)
        return torch.where(counts.any(dim=1, keepdim=True), first - 1, length - 1).clamp_min(0)
    if mask is None or mask.ndim != 2 or mask.shape[1] != length:
        return torch.full((1, 1), length - 1)
    columns = torch.arange(length, device=mask.device)
    return (columns * (mask != 0)).amax(dim=1, keepdim=True)
