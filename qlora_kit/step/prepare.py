"""How a training step runs through the model: fused layers, or the model's own code.

`fused` lets every decoder layer run as one step of autograd (`qlora_kit/block`), with the
activations kept that a policy names, and attention through `ops/attention`. They need to know
what the model's own code reads off a mask: that padding is on the right, where nobody sees
it, and where packed documents start. `FusedCollator` reads both off the batch while it is
still on the CPU, and `fused_inputs` says them in the words that transformers hands through
its models, so that no training step makes a mask or waits for the GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from qlora_kit.adapters.prompt.prefix_tuning import PromptParameters
from qlora_kit.block.compiled import CompiledLayers, compile_layers
from qlora_kit.block.install import (
    FusedBlocks,
    FusedLayer,
    decoder_layers,
    fuse_blocks,
    why_not_fused,
)
from qlora_kit.block.tiles import Tile, tile_tokens
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.log import logger
from qlora_kit.nn.host_embedding import lookup_waits
from qlora_kit.ops.attention.rule import Documents
from qlora_kit.ops.attention.transformers_door import packed_inputs, register, unpadded_inputs
from qlora_kit.step.head_input import TARGET_POSITIONS, target_positions

Collate = Callable[[list[Any]], dict[str, Any]]

STEPS = ("auto", "fused", "compiled", "eager")
"""`auto` is `fused` on a GPU wherever the model's layers can, and `eager` elsewhere; `compiled`
lets torch.compile run the layers of any causal model."""

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""The argument that turns transformers' own recomputation on, by the names it has had."""

MASKLESS = "maskless"
"""A key of a collated batch: its attention mask says nothing that causality does not."""

STARTS, LONGEST = "document_starts", "document_longest"
"""Keys of a collated batch: the fields of its `Documents`."""


@dataclass(frozen=True, slots=True)
class FusedCollator:
    """Adds to a collated batch what fused layers need to know.

    Example:
        >>> import torch
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
            The batch, with `maskless` where its mask pads on the right only or is missing,
            with its documents where positions start anew within rows, with the positions of
            its targets, and without a cache, which transformers would fill and nobody read.
        """
        return marked(self.collate(rows))


def marked(collated: dict[str, Any]) -> dict[str, Any]:
    """Add to a collated batch what fused layers need to know; on the CPU, or the host waits.

    Args:
        collated: arguments of a model's forward. Not modified.

    Returns:
        As `FusedCollator` gives them.

    Example:
        >>> import torch
        >>> sorted(marked({"input_ids": torch.ones(1, 2, dtype=torch.int64)}))
        ['input_ids', 'maskless', 'use_cache']
    """
    batch = {"use_cache": False, **collated}
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        batch[MASKLESS] = bool((mask[:, 1:] <= mask[:, :-1]).all())
    elif mask is None:
        batch[MASKLESS] = True
        if isinstance(positions, Tensor) and bool((positions[:, 1:] == 0).any()):
            documents = Documents.from_positions(positions)
            batch[STARTS], batch[LONGEST] = documents.starts, documents.longest
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        batch[TARGET_POSITIONS] = target_positions(labels)
    return batch


def fused_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Say what `FusedCollator` found in the words that transformers' models hand through.

    Args:
        batch: collated, with its marks or without. Not modified.

    Returns:
        What the model takes.

    Example:
        >>> sorted(fused_inputs({"input_ids": 1, "maskless": False, "attention_mask": 2}))
        ['attention_mask', 'input_ids']
        >>> fused_inputs({"input_ids": 1, "maskless": True})["attention_mask"].shape
        torch.Size([1, 1, 1, 1])
    """
    marks = (MASKLESS, STARTS, LONGEST)
    inputs = {name: value for name, value in batch.items() if name not in marks}
    if STARTS in batch:
        return inputs | packed_inputs(Documents(batch[STARTS], batch[LONGEST]))
    return inputs | unpadded_inputs() if batch.get(MASKLESS) else inputs


class FusedModel:
    """A model prepared for training; `remove` undoes it.

    Attributes:
        blocks: its layers.
    """

    def __init__(self, model: PreTrainedModel, blocks: FusedBlocks | CompiledLayers) -> None:
        """Switch attention.

        Args:
            model: whose layers are fused or compiled.
            blocks: the layers.
        """
        self.blocks = blocks
        self._model = model
        self._attention = model.config._attn_implementation
        model.set_attn_implementation(register())

    @property
    def never_waits(self) -> bool:
        """Whether a step may be recorded as a CUDA graph: fused layers, no wait for the CPU."""
        return isinstance(self.blocks, FusedBlocks) and not lookup_waits(self._model)

    def keep_decoded(self, layers: int, dtype: torch.dtype) -> None:
        """Decode some layers' weights once and for all, where layers are fused.

        Args:
            layers: how many, from the first on.
            dtype: that they compute in.
        """
        if isinstance(self.blocks, FusedBlocks):
            self.blocks.keep_decoded(layers, dtype)

    def remove(self) -> None:
        """Give the model its own layers and attention back."""
        self.blocks.remove()
        self._model.set_attn_implementation(self._attention)


def prepare_model(
    model: PreTrainedModel,
    args: TrainingArguments,
    step: str,
    activations: str,
    tile: Tile = "auto",
) -> FusedModel | None:
    """Prepare a causal model's layers for training.

    Args:
        model: adapters attached.
        args: of the training. Where layers are fused, its gradient checkpointing is turned
            off: what is computed again is theirs to decide.
        step: one of `STEPS`.
        activations: what fused layers keep; see `block/policy.py`. `auto` is
            `recompute_all` with gradient checkpointing, else `recompute_elementwise`.
        tile: tokens that fused layers treat at a time where each is alone; see `block/tiles.py`.

    Returns:
        The prepared model, or None for the model's own code.

    Raises:
        ConfigError: `fused` or `compiled` was asked for and the model's layers cannot, or a
            name is unknown.
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
    layers: FusedBlocks | CompiledLayers
    if step == "compiled":
        if any(isinstance(module, PromptParameters) for module in model.modules()):
            raise ConfigError(
                "a prefix or a prompt works through the model's own attention and hooks, which "
                "compiled layers replace. Use train.step=eager."
            )
        layers = compile_layers(model, activations)
    else:
        layers = fuse_blocks(
            model, activations, deterministic=args.full_determinism, tile=tile_tokens(tile)
        )
    model.train(training)
    for name in CHECKPOINTING:
        if hasattr(args, name):
            setattr(args, name, False)
    return FusedModel(model, layers)


@contextmanager
def fused_evaluation(
    model: PreTrainedModel, step: str = "auto", tile: Tile = "auto"
) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Let held-out batches run through fused layers, where training would.

    They take the tiles that training takes and keep nothing, so that a row that can be trained
    on can be measured, before a training and after it, with adapters on or off.

    Args:
        model: in evaluation mode; its layers may be fused already.
        step: of the training; `compiled` and `eager` leave the model's own layers.
        tile: of the training.

    Yields:
        From a collated batch on the CPU to what the model takes.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
        >>> with fused_evaluation(model.eval().requires_grad_(False), "fused"):
        ...     type(model.model.layers[0]).__name__
        'FusedLlamaDecoderLayer'
        >>> type(model.model.layers[0]).__name__
        'LlamaDecoderLayer'
    """
    if any(isinstance(layer, FusedLayer) for layer in decoder_layers(model)):
        yield _told
        return
    wanted = step == "fused" or (step == "auto" and model.device.type == "cuda")
    if not wanted or why_not_fused(model) is not None:
        yield dict
        return
    fused = FusedModel(model, fuse_blocks(model, "recompute_all", tile=tile_tokens(tile)))
    try:
        yield _told
    finally:
        fused.remove()


def _told(batch: dict[str, Any]) -> dict[str, Any]:
    return fused_inputs(marked(batch))
