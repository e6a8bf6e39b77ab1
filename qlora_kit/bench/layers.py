"""How a model's layers run while a point is measured: fused, or by their own code.

What `prepare_model` does for the Trainer it does here, so a benchmark times what users train
with; a full fine-tuning, whose weights fused layers cannot train, has the model's own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from qlora_kit.bench.subject import Batch, NotPossible
from qlora_kit.block.install import why_not_fused
from qlora_kit.block.tiles import Tile
from qlora_kit.nn.host_embedding import base_dtype
from qlora_kit.step.head_input import TARGET_POSITIONS, target_positions
from qlora_kit.step.prepare import prepare_model


class KnownPositions:
    """Which positions of a batch have a target, found out on the CPU before its first step.

    As the Trainer's collator does it, so that the step never waits for the GPU.

    Example:
        >>> import torch
        >>> sorted(KnownPositions().added({"labels": torch.tensor([[1, 2]])}))
        ['labels', 'target_positions']
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def added(self, batch: Batch) -> Batch:
        """A batch with its positions; the same few batches come again and again.

        Args:
            batch: with labels.

        Returns:
            A new one.
        """
        labels = batch["labels"]
        if id(labels) not in self._known:
            positions = target_positions(labels.cpu()).to(labels.device)
            self._known[id(labels)] = labels, positions
        return {**batch, TARGET_POSITIONS: self._known[id(labels)][1]}


def without_positions(batch: Batch) -> Batch:
    """What a model takes that makes its own loss.

    Args:
        batch: with positions or without. Not modified.

    Returns:
        The batch without them.

    Example:
        >>> without_positions({"labels": 1, "target_positions": 2})
        {'labels': 1}
    """
    return {name: value for name, value in batch.items() if name != TARGET_POSITIONS}


@contextmanager
def own_layers(model: PreTrainedModel, policy: str) -> Iterator[None]:
    """Run a model's own code under one of the policies it knows.

    Args:
        model: in training mode.
        policy: `save`, or `recompute_all` for non-reentrant checkpointing of every layer.

    Yields:
        Nothing.

    Raises:
        NotPossible: it has no such policy.
    """
    if policy == "save":
        yield
        return
    if policy != "recompute_all":
        raise NotPossible(f"the eager step has no policy {policy}")
    # Transformers renames "gradient" to "activation" checkpointing within version 5.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    getattr(model, f"{name}_checkpointing_enable")(options)
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


@contextmanager
def policy_context(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    policy: str,
    step: str,
    tile: Tile = "auto",
    keep_decoded: int = 0,
) -> Iterator[str]:
    """Run the model's layers under an activation policy while the context lasts.

    Args:
        model: with an adapter.
        arguments: of the Trainer, which prepares its models in the same way.
        policy: see `qlora_kit.block.policy`; the eager step knows `save` and `recompute_all`.
        step: `fused`, `eager`, or `auto` for fused where the model's layers can be.
        tile: tokens that fused layers treat at a time.
        keep_decoded: layers whose weights stay decoded, where layers are fused.

    Yields:
        `fused` or `eager`.

    Raises:
        NotPossible: the layers cannot be fused, or the eager step has no such policy.
    """
    reason = "eager was asked for" if step == "eager" else why_not_fused(model)
    if reason is None:
        fused = prepare_model(model, arguments, "fused", policy, tile)
        assert fused is not None
        if keep_decoded:
            fused.keep_decoded(keep_decoded, base_dtype(model))
        try:
            yield "fused"
        finally:
            fused.remove()
    elif step == "fused":
        raise NotPossible(f"the layers cannot be fused: {reason}")
    else:
        with own_layers(model, policy):
            yield "eager"
