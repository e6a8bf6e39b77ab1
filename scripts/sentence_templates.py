"""Sentences from the templates that voice assistants are written in.

The notation is that of Home Assistant's intents (the `hassil` parser's):

    turn (on|off) [the] {area} light[s]     alternatives, optional parts, slots
    <turn> on {color_name:color}            another template by name; a list and its slot
    (volume up;[in] {area})                 parts in any order

`parse` builds a tree once; `sample` walks it with a random generator and returns
a sentence and the slots it filled. Sampling, not listing: some templates have
millions of sentences. Standard library only.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Value = str | int | float
Slots = dict[str, Value]
Fill = Callable[[str, random.Random], tuple[str, Value]]
"""Chooses an entry of a list: (list name, generator) -> (what is said, what it means)."""

Kind = Literal["text", "sequence", "choice", "permutation", "rule", "slot"]


class TemplateError(ValueError):
    """A template is malformed or names an unknown rule."""


@dataclass(frozen=True, slots=True)
class Node:
    """One part of a template."""

    kind: Kind
    text: str = ""
    """Literal text, or the name of a rule or list."""
    slot: str = ""
    """Slot a list fills."""
    parts: tuple["Node", ...] = field(default=())


def parse(template: str) -> Node:
    """Build the tree of a template.

    Args:
        template: text in the notation above. Spaces count, as in `light[s]`.

    Returns:
        The root.

    Raises:
        TemplateError: a bracket is not closed, or closed twice.

    Example:
        >>> parse("a [b]").kind
        'sequence'
    """
    node, end = _alternatives(template, 0)
    if end != len(template):
        raise TemplateError(f"unexpected {template[end]!r} at {end} in {template!r}")
    return node


def sample(
    node: Node,
    rules: Mapping[str, Node],
    fill: Fill,
    generator: random.Random,
) -> tuple[str, Slots]:
    """Draw one sentence.

    Args:
        node: from `parse`.
        rules: templates by name, parsed.
        fill: chooses list entries.
        generator: decides everything that is open.

    Returns:
        The sentence, single-spaced, and the slots filled on the way.

    Raises:
        TemplateError: a rule is unknown.

    Example:
        >>> sample(parse("a [b] {x:y}"), {}, lambda name, _: ("one", 1), random.Random(0))
        ('a b one', {'y': 1})
    """
    slots: Slots = {}
    said = _walk(node, rules, fill, generator, slots)
    return " ".join(said.split()), slots


def _walk(
    node: Node, rules: Mapping[str, Node], fill: Fill, generator: random.Random, slots: Slots
) -> str:
    if node.kind == "text":
        return node.text
    if node.kind == "sequence":
        return "".join(_walk(part, rules, fill, generator, slots) for part in node.parts)
    if node.kind == "choice":
        return _walk(generator.choice(node.parts), rules, fill, generator, slots)
    if node.kind == "permutation":
        order = generator.sample(node.parts, len(node.parts))
        return " " + " ".join(_walk(part, rules, fill, generator, slots) for part in order) + " "
    if node.kind == "rule":
        if node.text not in rules:
            raise TemplateError(f"unknown rule <{node.text}>")
        return _walk(rules[node.text], rules, fill, generator, slots)
    said, slots[node.slot] = fill(node.text, generator)
    return said


def _alternatives(text: str, at: int) -> tuple[Node, int]:
    """Parse `a|b` or `a;b` up to a closing bracket or the end."""
    parts: list[Node] = []
    separators: set[str] = set()
    while True:
        part, at = _sequence(text, at)
        parts.append(part)
        if at < len(text) and text[at] in "|;":
            separators.add(text[at])
            at += 1
            continue
        break
    if not separators:
        return parts[0], at
    if len(separators) > 1:
        raise TemplateError(f"'|' and ';' in one group need brackets: {text!r}")
    return Node("choice" if separators == {"|"} else "permutation", parts=tuple(parts)), at


def _sequence(text: str, at: int) -> tuple[Node, int]:
    parts: list[Node] = []
    while at < len(text) and text[at] not in "|;)]":
        opener = text[at]
        if opener in "([":
            inner, at = _alternatives(text, at + 1)
            closer = ")" if opener == "(" else "]"
            if at >= len(text) or text[at] != closer:
                raise TemplateError(f"missing {closer!r} in {text!r}")
            at += 1
            parts.append(inner if opener == "(" else Node("choice", parts=(Node("text"), inner)))
        elif opener in "{<":
            closer = "}" if opener == "{" else ">"
            end = text.find(closer, at)
            if end < 0:
                raise TemplateError(f"missing {closer!r} in {text!r}")
            name, _, slot = text[at + 1 : end].partition(":")
            parts.append(Node("rule", name) if opener == "<" else Node("slot", name, slot or name))
            at = end + 1
        else:
            end = at
            while end < len(text) and text[end] not in "()[]{}<>|;":
                end += 1
            if end == at:
                raise TemplateError(f"unexpected {text[at]!r} at {at} in {text!r}")
            parts.append(Node("text", text[at:end]))
            at = end
    return (parts[0] if len(parts) == 1 else Node("sequence", parts=tuple(parts))), at
