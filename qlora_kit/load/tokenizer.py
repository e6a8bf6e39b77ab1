"""The model's tokenizer, with a pad token that exists.

Batches need padding, and many base models come without a pad token. Adding one
would mean resizing embeddings, which changes shapes that adapters and merged
models must share. So an existing token is chosen: the one the model's
configuration names, a token reserved for the purpose, the unknown token, or the
end token. Nothing in this package tells padding by its id (labels are masked by
position), so sharing the end token is safe here.
"""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.core.errors import SourceError
from qlora_kit.core.log import logger

RESERVED = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|PAD|>",
    "<|reserved_special_token_0|>",
)
"""Names of tokens that vocabularies hold for padding without declaring them."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint folder.

    Args:
        folder: local folder.

    Returns:
        The tokenizer, its chat template included; None if the folder has none.

    Raises:
        SourceError: the tokenizer's files cannot be used.
    """
    if not any((folder / name).is_file() for name in _FILES):
        logger.warning("%s has no tokenizer; copy one there to train on text", folder)
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(
            f"the tokenizer in {folder} cannot be loaded: {error}. Copy the tokenizer files of the "
            "original model again."
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def settle_pad_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Give a tokenizer and its model one pad token the embeddings know.

    Args:
        tokenizer: modified: `pad_token`.
        model: modified: `pad_token_id` of its configurations.

    Raises:
        SourceError: the tokenizer has no token that could serve.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    token = _choose(tokenizer, model.config.get_text_config().pad_token_id, rows)
    if token is None:
        raise SourceError(
            f"the tokenizer has no pad, unknown or end token below {rows}, the number of "
            "embeddings. Set `pad_token` in tokenizer_config.json to a token of the vocabulary."
        )
    if token != tokenizer.pad_token:
        logger.info("padding with %r", token)
        tokenizer.pad_token = token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.config.get_text_config() is not model.config:
        model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _choose(tokenizer: PreTrainedTokenizerBase, configured: int | None, rows: int) -> str | None:
    """The first candidate that is in the vocabulary and has an embedding."""
    names: list[str | None] = [tokenizer.pad_token]
    if configured is not None and 0 <= configured < min(rows, len(tokenizer)):
        name = tokenizer.convert_ids_to_tokens(configured)
        names.append(name if isinstance(name, str) else None)
    names += [*RESERVED, tokenizer.unk_token, tokenizer.eos_token]
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if isinstance(name, str) and vocabulary.get(name, rows) < rows:
            return name
    return None
