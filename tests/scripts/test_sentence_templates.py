"""The template notation: alternatives, options, permutations, rules, slots."""

import random

import pytest

from tests.scripts.loading import load_script

templates = load_script("sentence_templates")


def sentences(text, rules=(), draws=200):
    """Every sentence (and its slots) that many draws give."""
    generator = random.Random(0)
    parsed = {name: templates.parse(rule) for name, rule in dict(rules).items()}
    tree = templates.parse(text)

    def fill(name, generator):
        number = generator.randint(1, 2)
        return f"{name}{number}", number

    drawn = [templates.sample(tree, parsed, fill, generator) for _ in range(draws)]
    return dict(drawn)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("turn it on", {"turn it on"}),
        ("turn (on|off)", {"turn on", "turn off"}),
        ("light[s] on", {"light on", "lights on"}),
        ("[the|my] light", {"light", "the light", "my light"}),
        ("a[[ ]%| percent]", {"a", "a%", "a %", "a percent"}),
        ("two( |-)hour", {"two hour", "two-hour"}),
        ("(up;[in] here) now", {"up here now", "up in here now", "here up now", "in here up now"}),
        ("<turn> [<turn>]", {"go", "go go", "run", "run run", "go run", "run go"}),
        ("(a (b|c)|d)", {"a b", "a c", "d"}),
    ],
)
def test_every_sentence_of_a_template_and_no_other(text, expected):
    assert set(sentences(text, {"turn": "(go|run)"})) == expected


def test_slots_are_named_after_the_list_or_by_a_colon():
    assert sentences("{area} to {level:brightness}")["area1 to level2"] == {
        "area": 1,
        "brightness": 2,
    }


def test_slots_inside_a_rule_and_an_option():
    found = sentences("on [<where>]", {"where": "in {area}"})
    assert found["on"] == {}
    assert found["on in area2"] == {"area": 2}


@pytest.mark.parametrize("text", ["(a", "[a", "a)", "{a", "<a", "(a|b;c)", "a}", "a]"])
def test_malformed_templates(text):
    with pytest.raises(templates.TemplateError):
        templates.parse(text)


def test_unknown_rule():
    with pytest.raises(templates.TemplateError, match="unknown rule <nothing>"):
        sentences("<nothing>")
