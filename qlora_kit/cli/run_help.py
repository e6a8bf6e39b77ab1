"""Help for the commands that take a run file: every field, in 79 columns.

Written from the schema and not by the argument parser, whose help repeats type
annotations; it needs no import beyond the standard library, so it is instant.
"""

import textwrap

from qlora_kit.cli.arguments import WIDTH
from qlora_kit.cli.schema import SchemaField, sections, type_text

_INDENT = 26


def field_help(field: SchemaField) -> str:
    """Write the help of one field.

    Args:
        field: a leaf of the run schema.

    Returns:
        Lines of at most `WIDTH` columns.

    Example:
        >>> from qlora_kit.cli.schema import leaves
        >>> print(field_help(leaves()["train.seed"]))
          --train.seed            Seed of data order, adapter start and dropout.
                                  [whole number; default 0]
    """
    kind = f"{type_text(field.hint)}; "
    kind += "required" if field.required else f"default {field.default_text or chr(39) * 2}"
    words = f"{field.doc} [{kind}]".replace("`", "")
    margin = " " * _INDENT
    body = textwrap.wrap(
        words, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )
    flag = f"  --{field.key}"
    if len(flag) > _INDENT - 2:
        return "\n".join([flag, *body])
    return "\n".join([flag + body[0][len(flag) :], *body[1:]])


def run_help(usage: str, description: str, own: dict[str, str]) -> str:
    """Write the whole help text of a command that takes a run file.

    Args:
        usage: the words after `usage: `.
        description: what the command does.
        own: the command's own flags, each with its help.

    Returns:
        Text that ends in a line break.
    """
    parts = [f"usage: {usage}", "", description.strip(), "", "options:"]
    for flag, text in own.items():
        wrapped = textwrap.wrap(text, WIDTH - _INDENT, break_on_hyphens=False)
        parts.append(f"  {flag:<{_INDENT - 2}}{wrapped[0]}")
        parts += [" " * _INDENT + line for line in wrapped[1:]]
    for section in sections():
        title = f"{section.name}: {section.doc}" if section.name else "run:"
        parts += ["", *textwrap.wrap(title, WIDTH)]
        parts += [field_help(field) for field in section.fields]
    return "\n".join(parts) + "\n"
