"""Pre-tokenizers named by GGUF files split text as the models' own do."""

from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from qlora_kit.checkpoint import gguf_tokenizer
from qlora_kit.checkpoint.gguf_tokenizer import build_tokenizer, byte_level
from qlora_kit.core.errors import FormatError
from tests.checkpoint import gguf_files

FILE = Path("m.gguf")
TEXT = "Héllo WORLD's 12345 don't\n\n  x=1;//y\t_z 世界"


def fields(**changes):
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": gguf_files.tokens(),
        "tokenizer.ggml.merges": ["1 2"],
    }
    return base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def pieces(pre):
    tokenizer = byte_level(FILE, fields(pre=pre))
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 12345 it's")]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["ab", "Ġ12345", "Ġit", "'s"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4", "5", "Ġit", "'s"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4", "5", "Ġit", "'s"]),
        ("llama-bpe", ["ab", "Ġ", "123", "45", "Ġit", "'s"]),
        ("tekken", ["ab", "Ġ", "1", "2", "3", "4", "5", "Ġit", "'s"]),
        ("gpt-4o", ["ab", "Ġ", "123", "45", "Ġit's"]),
    ],
)
def test_numbers_and_contractions(pre, expected):
    assert pieces(pre) == expected


@pytest.mark.parametrize("pre", sorted({*gguf_tokenizer.SPLITS, *gguf_tokenizer.DIGITS}))
def test_every_split_keeps_every_character(pre):
    tokenizer = byte_level(FILE, fields(pre=pre))
    split = tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert split[0][1][0] == 0
    assert sum(end - start for _, (start, end) in split) == len(TEXT)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older ones have no such table"
)
def test_regular_expressions_are_transformers_own():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shared = GGUF_PRE_TOKENIZER_SPLITS.keys() & gguf_tokenizer.SPLITS.keys()
    assert len(shared) >= 12
    for name in shared:
        ours, theirs = (
            byte_level_with(regex)
            for regex in (gguf_tokenizer.SPLITS[name], GGUF_PRE_TOKENIZER_SPLITS[name])
        )
        assert ours.pre_tokenize_str(TEXT) == theirs.pre_tokenize_str(TEXT), name


def byte_level_with(regex):
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(regex), behavior="isolated")


def test_begin_and_end_tokens_only_where_the_file_asks():
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    assert build_tokenizer(FILE, fields(**ids)).encode("1") == [gguf_files.tokens().index("1")]
    both = build_tokenizer(FILE, fields(**ids, add_bos_token=True, add_eos_token=True))
    assert both.encode("1") == [1, gguf_files.tokens().index("1"), 2]
    assert both.encode("1", add_special_tokens=False) == [gguf_files.tokens().index("1")]


def test_what_cannot_be_read_is_refused():
    with pytest.raises(FormatError, match=r"pre-tokenizer 'unheard-of', which is not known"):
        byte_level(FILE, fields(pre="unheard-of"))
    with pytest.raises(FormatError, match="no tokenizer"):
        build_tokenizer(FILE, {})
    with pytest.raises(FormatError, match="no merges"):
        build_tokenizer(FILE, fields(merges=None))
    with pytest.raises(FormatError, match="'rwkv' tokenizer"):
        build_tokenizer(FILE, fields(model="rwkv"))
