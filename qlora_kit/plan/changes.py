"""What a search may change in a run, in the words of a run file."""

from dataclasses import replace

from transformers import PreTrainedConfig

from qlora_kit.plan.setup import FULL, Setup

PAGED = "paged_adamw_8bit"
"""An optimizer whose state can leave the GPU."""
LEAN_TILE = 2048
"""Tokens at a time; a number also rounds adapters a layer at a time."""
FIELDS = {
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
    return found


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
