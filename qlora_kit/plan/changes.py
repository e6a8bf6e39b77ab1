"""What a search may change in a run, in the words of a run file."""

from dataclasses import replace

from transformers import PreTrainedConfig

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import ConfigError
from qlora_kit.plan.predict import Prediction
from qlora_kit.plan.setup import FULL, Setup

PAGED = "paged_adamw_8bit"
"""An optimizer whose state can leave the GPU."""
LEAN_TILE = 2048
"""Tokens at a time; a number also rounds adapters a layer at a time."""
FIELDS = {
    "bits": "model.bits",
    "activations": "train.activations",
    "keep_decoded": "train.keep_decoded",
    "batch": "train.batch_size",
    "accumulation": "train.gradient_accumulation",
    "seq": "data.max_length",
    "optimizer": "train.optimizer",
    "tile": "train.tile",
    "embeddings_on_host": "model.embeddings_on_host",
}
"""Of a setup that a search may change, by the field of a run that says so."""


def changes(before: Setup, after: Setup) -> dict[str, str]:
    """What to change in a run to make it another.

    Args:
        before: as it is.
        after: as it should be.

    Returns:
        Dotted field to value.

    Example:
        >>> changes(Setup(batch=4), Setup(batch=2, accumulation=2))
        {'train.batch_size': '2', 'train.gradient_accumulation': '2'}
    """
    found = {
        key: str(getattr(after, name)).lower()
        for name, key in FIELDS.items()
        if getattr(after, name) != getattr(before, name)
    }
    if before.quant != after.quant == before.quant.with_head():
        found["model.quantize_head"] = "true"
    one, other = before.lora, after.lora
    if one is not None and other is not None and one.rank != other.rank:
        found |= {"adapter.rank": str(other.rank), "adapter.alpha": f"{other.alpha:g}"}
    return found


def speed_change(before: Prediction, after: Prediction) -> float:
    """What changes do to a run's speed.

    Args:
        before: the run as it is; whether it fits does not matter.
        after: the changed one.

    Returns:
        Share of the tokens/s that is gained or, below zero, lost.
    """
    return after.tokens_per_s / before.tokens_per_s - 1


def with_rank(setup: Setup, rank: int) -> Setup:
    """The same run with an adapter of another rank, whose scale stays what it was.

    Args:
        setup: of the run; with an adapter.
        rank: of all its modules.

    Returns:
        A setup.

    Raises:
        ConfigError: the method has none.

    Example:
        >>> small = with_rank(Setup(rank=16), 4)
        >>> small.lora.rank, small.lora.alpha
        (4, 8.0)
    """
    adapter = setup.lora
    if adapter is None:
        raise ConfigError(f"{setup.method} has no rank; with_rank needs a method like LoRA.")
    shape = setup.shape or LoRA(rank=setup.rank, targets=setup.targets)
    alpha = adapter.alpha * adapter.scale(adapter.rank, 1.0) / adapter.scale(rank, 1.0)
    return replace(setup, rank=rank, shape=replace(shape, rank=rank, alpha=alpha))


def leaner(setup: Setup, config: PreTrainedConfig) -> Setup:
    """The same run with whatever makes it smaller and changes no result but by rounding.

    Args:
        setup: of the run.
        config: of its model.

    Returns:
        A setup with paged 8-bit state and tiles; where the head is not tied to the embeddings,
        these on the host, and the head in 4 bits if the linears are.

    Example:
        >>> from transformers import LlamaConfig
        >>> lean = leaner(Setup(), LlamaConfig(tie_word_embeddings=False))
        >>> sorted(changes(Setup(), lean))
        ['model.embeddings_on_host', 'model.quantize_head', 'train.optimizer', 'train.tile']
    """
    if setup.method == FULL:
        return setup
    lean = replace(setup, optimizer=PAGED, tile=LEAN_TILE)
    if config.get_text_config().tie_word_embeddings:
        return lean
    quant = setup.quant.with_head() if setup.bits == 4 else setup.quant
    return replace(lean, embeddings_on_host=True, quant=quant)
