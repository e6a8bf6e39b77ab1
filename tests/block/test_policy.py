"""Reading activation policies."""

import pytest

from qlora_kit.block.policy import POLICIES, parse_policy
from qlora_kit.core.errors import ConfigError


@pytest.mark.parametrize("word", POLICIES)
def test_one_word_is_for_all_layers(word: str) -> None:
    assert parse_policy(word, 3) == (word,) * 3


@pytest.mark.parametrize(
    ("text", "layers", "wanted"),
    [
        ("save:2,recompute_all:1", 3, ("save", "save", "recompute_all")),
        (" save:1 , offload ", 3, ("save", "offload", "offload")),
        ("save:3", 3, ("save",) * 3),
        ("save:0,recompute_all", 2, ("recompute_all",) * 2),
        ("save:2,recompute_all", 2, ("save", "save")),
        ("save:1,offload:1,save:1", 3, ("save", "offload", "save")),
    ],
)
def test_mixtures(text: str, layers: int, wanted: tuple[str, ...]) -> None:
    assert parse_policy(text, layers) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("everything", r"unknown activation policy 'everything'; known: save, "),
        ("", r"unknown activation policy ''.*such as recompute_all:24,save:8"),
        ("save:8,", r"unknown activation policy ''"),
        ("save,recompute_all", r"needs a number of layers after 'save', as in save:8"),
        ("save:many", r"needs a number of layers after 'save'"),
        ("save:-1,recompute_all", r"needs a number of layers after 'save'"),
        ("save:1.5", r"needs a number"),
        ("save:8,recompute_all:8", r"is for 16 layers, and the model has 32"),
        ("save:40,recompute_all", r"is for 40 layers, and the model has 32"),
    ],
)
def test_errors_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_policy(text, 32)
