"""The run schema, read from its dataclasses: names, types, defaults, and the text under each field.

Help texts, docs/configuration.md and the search for the nearest known name all
come from here, so that a field is described once, in `qlora_kit/train/config.py`.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qlora_kit.train.config import RunConfig

_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaField:
    """One leaf of the run schema."""

    key: str
    """Dotted name, as in YAML and on the command line: `train.epochs`."""
    hint: Any
    """Type annotation."""
    default: Any
    """Default value; `dataclasses.MISSING` when one has to be given."""
    doc: str
    """The docstring under the field."""

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is dataclasses.MISSING

    @property
    def is_flag(self) -> bool:
        """Whether the field is true or false."""
        return self.hint is bool

    @property
    def default_text(self) -> str:
        """The default as one would write it in YAML."""
        return "required" if self.required else yaml_text(self.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The fields of one dataclass; the section of the top level has no name."""

    name: str
    """Key of the section in YAML, empty for the top level."""
    doc: str
    """First line of the dataclass's docstring."""
    fields: tuple[SchemaField, ...]
    """Its leaves, in the order of the source."""


def yaml_text(value: Any) -> str:
    """Write a default value as YAML would have it, on one line.

    Args:
        value: a plain value.

    Returns:
        The text.

    Example:
        >>> yaml_text(None), yaml_text(True), yaml_text(("a", "b")), yaml_text(2e-4)
        ('null', 'true', '[a, b]', '2e-4')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(yaml_text(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return str(value)


def type_text(hint: Any) -> str:
    """Describe a type annotation in words a user knows.

    Args:
        hint: an annotation of the run schema.

    Returns:
        The words.

    Example:
        >>> type_text(Literal[4, 16]), type_text(int | None), type_text(tuple[str, ...])
        ('4 or 16', 'whole number or null', 'list of text')
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _alternatives([str(value) for value in arguments])
    if origin in (Union, UnionType):
        words = [type_text(part) for part in arguments if part is not NoneType]
        return _alternatives(words + ["null"] * (NoneType in arguments))
    if origin is tuple:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _alternatives(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def attribute_docs(cls: type) -> dict[str, str]:
    """Read the docstrings under the fields of a dataclass, inherited ones included.

    Args:
        cls: a dataclass whose source is at hand.

    Returns:
        Field name to its text, on one line.

    Example:
        >>> attribute_docs(RunConfig)["method"]
        'How the model is adapted.'
    """
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def _leaves(cls: type, prefix: str) -> Iterator[SchemaField]:
    hints, docs = get_type_hints(cls), attribute_docs(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield SchemaField(
            key=prefix + field.name,
            hint=hints[field.name],
            default=default,
            doc=docs.get(field.name, ""),
        )


@cache
def sections() -> tuple[Section, ...]:
    """The whole run schema: the top level first, then its sections in order.

    Returns:
        One entry per section.

    Example:
        >>> [section.name for section in sections()][:3]
        ['', 'model', 'data']
    """
    hints = get_type_hints(RunConfig)
    parts = [("", RunConfig)] + [
        (field.name, hints[field.name])
        for field in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(hints[field.name])
    ]
    return tuple(
        Section(
            name=name,
            doc=(cls.__doc__ or "").splitlines()[0],
            fields=tuple(_leaves(cls, f"{name}." if name else "")),
        )
        for name, cls in parts
    )


@cache
def leaves() -> dict[str, SchemaField]:
    """Every leaf of the run schema by its dotted name.

    Returns:
        Dotted name to field, in the order of the source.

    Example:
        >>> leaves()["model.bits"].default
        4
    """
    return {field.key: field for section in sections() for field in section.fields}
