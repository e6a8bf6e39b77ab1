"""How a training step runs through the model: fused layers, or the model's own code.

`fused` lets every decoder layer run as one step of autograd (`qlora_kit/block`), with the
activations kept that a policy names. It needs to know what the model's own code reads off a
mask: that padding is on the right, where nobody sees it, and where packed documents start.
`FusedCollator` reads both off the batch while it is still on the CPU, so that no training
step waits for the GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from qlora_kit.block.install import FusedBlocks, fuse_blocks, why_not_fused
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.log import logger
from qlora_kit.ops.attention.rule import Documents

Collate = Callable[[list[Any]], dict[str, Any]]

STEPS = ("auto", "fused", "eager")
"""`auto` is `fused` on a GPU wherever the model's layers can, and `eager` elsewhere."""

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""The argument that turns transformers' own recomputation on, by the names it has had."""

MASKLESS = "maskless"
"""A key of a collated batch: its attention mask says nothing that causality does not."""


@dataclass(frozen=True, slots=True)
class FusedCollator:
    """Adds to a collated batch what fused layers need to know.

    Example:
        >>> def collate(rows):
        ...     return {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
        >>> FusedCollator(collate)([])[MASKLESS]
        True
    """

    collate: Collate
    """Makes the batch, on the CPU."""

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Collate rows.

        Args:
            rows: of a data set.

        Returns:
            The batch, with `maskless` where its mask pads on the right only, with
            `cu_seq_lens_q` and `max_length_q` where its positions start anew within rows, and
            without a cache, which transformers would fill and nobody read.
        """
        batch = {"use_cache": False, **self.collate(rows)}
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            batch[MASKLESS] = bool((mask[:, 1:] <= mask[:, :-1]).all())
        elif mask is None and isinstance(positions, Tensor) and positions.dim() == 2:
            if bool((positions[:, 1:] == 0).any()):
                documents = Documents.from_positions(positions)
                batch["cu_seq_lens_q"] = documents.starts
                batch["max_length_q"] = documents.longest
        return batch


def without_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """Take the mark of `FusedCollator` off a batch, and the mask with it if it says so.

    Args:
        inputs: a collated batch. Not modified.

    Returns:
        What the model takes.

    Example:
        >>> without_mask({"input_ids": 1, "attention_mask": 2, "maskless": True})
        {'input_ids': 1}
    """
    if not inputs.get(MASKLESS, False):
        return {name: value for name, value in inputs.items() if name != MASKLESS}
    return {n: value for n, value in inputs.items() if n not in (MASKLESS, "attention_mask")}


def prepare_model(
    model: PreTrainedModel, args: TrainingArguments, step: str, activations: str
) -> FusedBlocks | None:
    """Prepare a causal model's layers for training.

    Args:
        model: adapters attached.
        args: of the training. Where layers are fused, its gradient checkpointing is turned
            off: what is computed again is theirs to decide.
        step: one of `STEPS`.
        activations: what fused layers keep; see `block/policy.py`. `auto` is
            `recompute_all` with gradient checkpointing, else `recompute_elementwise`.

    Returns:
        The fused layers, or None for the model's own code.

    Raises:
        ConfigError: `fused` was asked for and the model's layers cannot, or a name is unknown.
    """
    if step not in STEPS:
        raise ConfigError(f"unknown step {step!r}; known: {', '.join(STEPS)}.")
    if step == "eager" or (step == "auto" and model.device.type != "cuda"):
        return None
    training = model.training
    model.train()  # dropout counts as it will be
    reason = why_not_fused(model)
    if step == "auto" and reason is not None:
        logger.info("training through the model's own layers: %s.", reason)
        model.train(training)
        return None
    if activations == "auto":
        checkpointing = any(getattr(args, name, False) for name in CHECKPOINTING)
        activations = "recompute_all" if checkpointing else "recompute_elementwise"
    fused = fuse_blocks(model, activations, deterministic=args.full_determinism)
    model.train(training)
    for name in CHECKPOINTING:
        if hasattr(args, name):
            setattr(args, name, False)
    return fused
