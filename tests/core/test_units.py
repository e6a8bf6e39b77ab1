"""Sizes as people write them, and name patterns."""

import pytest

from qlora_kit.core.errors import ConfigError
from qlora_kit.core.patterns import matches, matches_any
from qlora_kit.core.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("44GiB", 44 * 1024**3), ("5 GB", 5 * 10**9), ("12", 12), ("1.5 KiB", 1536), (7, 7)],
)
def test_parse_bytes(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "4 parsecs", "-1GiB", "1e3"])
def test_parse_bytes_refuses_what_is_no_size(text):
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text)


def test_format_bytes_keeps_the_sign_and_picks_the_unit():
    assert format_bytes(-2 * 1024**2) == "-2.00 MiB"
    assert format_bytes(2 * 1024**4) == "2.00 TiB"
    assert format_bytes(2048) == "2.00 KiB"


def test_suffix_patterns_match_whole_parts_only():
    assert matches("a.self_attn.q_proj", "self_attn.q_proj")
    assert not matches("a.xq_proj", "q_proj")
    assert matches("q_proj", "q_proj")


def test_regular_expressions_match_the_whole_name():
    assert matches("layers.3.mlp", r"re:layers\.[0-4]\.mlp")
    assert not matches("layers.3.mlp.up", r"re:layers\.[0-4]\.mlp")
    assert not matches_any("layers.3.mlp", ())


def test_a_broken_regular_expression_is_named():
    with pytest.raises(ConfigError, match="re:"):
        matches("a", "re:(")
