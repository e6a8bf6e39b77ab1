"""The tokenizer inside a GGUF file, as a tokenizers/transformers one.

A GGUF file carries the vocabulary, the merges and the *name* of a pre-tokenizer,
not the pre-tokenizer itself. transformers 5.17 ignores that name, confuses the
end token with the first added one and mixes a sentencepiece decoder into
byte-level vocabularies; newer versions know some names but not the ones that
split digits one by one (SmolLM, StarCoder, Command R). Wrong splits still encode
and decode, so nothing fails: the model just sees token sequences it never saw
in training.

Byte-level vocabularies ("gpt2", which is nearly every current model) are
therefore assembled here from the vocabulary, the merges and the named split, the
same on every version. Sentencepiece vocabularies go through transformers'
converter. Special tokens always come from the file's own ids. An unknown
pre-tokenizer name is refused rather than guessed.

Sources: llama.cpp, src/llama-vocab.cpp (names and splits), MIT;
transformers, integrations/gguf (builders), Apache-2.0.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_SPLIT = _WORDS % ("", "") + r"|\p{N}" + _SLASH_TAIL
GPT4O_SPLIT = _WORDS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _SLASH_TAIL

PLAIN = ("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
SPLITS: dict[str, str] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"),
        LLAMA3_SPLIT,
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), QWEN2_SPLIT),
    "tekken": TEKKEN_SPLIT,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), GPT4O_SPLIT),
}
"""Pre-tokenizer names that are one regular expression."""


def build_tokenizer(file: Path, fields: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """Build the tokenizer a GGUF file describes.

    Args:
        file: the GGUF file.
        fields: its `tokenizer.*` metadata, by full key.

    Returns:
        A tokenizer that saves to and loads from a folder like any other.

    Raises:
        FormatError: the file has no tokenizer, or one that is not supported.

    Example:
        >>> words = ["a", "b", "ab", "<end>"]
        >>> fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": words,
        ...           "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 3,
        ...           "tokenizer.ggml.token_type": [1, 1, 1, 3]}
        >>> tokenizer = build_tokenizer(Path("m.gguf"), fields)
        >>> tokenizer("abb<end>")["input_ids"], tokenizer.eos_token
        ([2, 1, 3], '<end>')
    """
    from transformers import PreTrainedTokenizerFast

    tokens = fields.get("tokenizer.ggml.tokens")
    kind = fields.get("tokenizer.ggml.model")
    if not tokens or not kind:
        raise FormatError(
            f"{file} holds no tokenizer. Use the model's safetensors release instead."
        )
    backend = byte_level(file, fields) if kind == "gpt2" else _from_transformers(file, kind)
    special: dict[str, str] = {}
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        token_id = fields.get(f"tokenizer.ggml.{key}")
        if token_id is not None and 0 <= token_id < len(tokens):
            special[name] = tokens[token_id]
    _set_template(backend, fields, kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def byte_level(file: Path, fields: dict[str, Any]) -> "Tokenizer":
    """Assemble a byte-level BPE tokenizer from vocabulary, merges and pre-tokenizer name.

    Args:
        file: for messages.
        fields: the `tokenizer.*` metadata.

    Returns:
        The backend tokenizer, control and user-defined tokens added.

    Raises:
        FormatError: the merges are missing, or the pre-tokenizer's name is unknown.

    Example:
        >>> fields = {"tokenizer.ggml.tokens": ["1", "2", "12"], "tokenizer.ggml.merges": ["1 2"],
        ...           "tokenizer.ggml.pre": "smollm"}
        >>> byte_level(Path("m.gguf"), fields).encode("12").tokens
        ['1', '2']
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.merges")
    if merges is None:
        raise FormatError(f"{file} has a byte-level vocabulary but no merges.")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    pre = fields.get("tokenizer.ggml.pre", "default")
    # Llama 3's vocabulary holds whole words that its merges do not build.
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=pairs,
        ignore_merges=SPLITS.get(pre) == LLAMA3_SPLIT,
    )
    tokenizer = Tokenizer(model)
    if pre in PLAIN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre in DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif pre in SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        raise FormatError(
            f"{file} splits text with the pre-tokenizer {pre!r}, which is not known here (known: "
            f"{', '.join(sorted((*PLAIN, *DIGITS, *SPLITS)))}). "
            "Use the model's safetensors release."
        )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, types, strict=True)
            if kind == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def _from_transformers(file: Path, kind: str) -> "Tokenizer":
    """Sentencepiece-like vocabularies: transformers' own converter."""
    from transformers import AutoTokenizer

    if kind != "llama":
        raise FormatError(
            f"{file} has a {kind!r} tokenizer; supported are 'gpt2' (byte-level BPE) and 'llama' "
            "(sentencepiece). Use the model's safetensors release instead."
        )
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return tokenizer.backend_tokenizer


def _set_template(backend: "Tokenizer", fields: dict[str, Any], kind: str) -> None:
    """Add the begin and end tokens the file asks for around each text."""
    from tokenizers import processors

    tokens = fields["tokenizer.ggml.tokens"]
    # llama.cpp: a sentencepiece vocabulary that does not say otherwise begins with BOS.
    flags = {
        "bos": fields.get("tokenizer.ggml.add_bos_token", kind == "llama"),
        "eos": fields.get("tokenizer.ggml.add_eos_token", False),
    }
    used = {
        name: (tokens[token_id], token_id)
        for name, wanted in flags.items()
        if wanted and (token_id := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None
    }
    if not used and kind == "gpt2":
        return
    parts = [used[n][0] if n in used else None for n in ("bos", "eos")]
    single = [part for part in (parts[0], "$A", parts[1]) if part]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + [f"{part}:1" if part != "$A" else "$B:1" for part in single],
        special_tokens=list(used.values()),
    )
