"""From a YAML file and flags to one `RunConfig`.

jsonargparse converts and checks the values, from the dataclasses of the run
schema. Around it, for the sake of the messages: names are checked first, in the
file and on the command line, and an unknown one is refused with the nearest
known one; a type error becomes one line that says what the field takes.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from qlora_kit.cli.arguments import nearest
from qlora_kit.cli.schema import SchemaField, leaves, sections, type_text
from qlora_kit.core.errors import ConfigError
from qlora_kit.train.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """The words after `qlora-kit train`, sorted."""

    config: Path | None
    """The YAML file."""
    overrides: dict[str, str]
    """Dotted name to the text given for it."""
    options: dict[str, str]
    """The command's own options that were given; switches are `true`."""


def parse_words(
    argv: Sequence[str], command: str, switches: Sequence[str] = (), options: Sequence[str] = ()
) -> CommandLine:
    """Sort the words of a command line and check the names.

    Args:
        argv: words such as `run.yaml --train.epochs 2 --dry-run`.
        command: the command's name, for messages.
        switches: names of the command's own flags that take no value.
        options: names of the command's own flags that take one.

    Returns:
        The sorted words; values are still text.

    Raises:
        ConfigError: a flag is unknown or lacks its value, or two files are given.

    Example:
        >>> parse_words(["run.yaml", "--resume", "--train.epochs=2"], "train").overrides
        {'resume': 'true', 'train.epochs': '2'}
    """
    config: Path | None = None
    overrides: dict[str, str] = {}
    own: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or (name == "config" and config is not None):
            if config is not None or word.startswith("-"):
                raise ConfigError(
                    f"qlora-kit {command} takes one YAML file and --flags, and cannot place "
                    f"{word!r}. See `qlora-kit {command} --help`."
                )
            config = Path(word)
        elif name in switches and not equals:
            own[name] = "true"
        elif name in options:
            own[name] = value if equals else _take(words, name)
        elif name == "config":
            config = Path(value if equals else _take(words, name))
        else:
            field = _known_field(name, command, (*switches, *options))
            if not equals:
                bare = field.is_flag and (not words or words[0] not in ("true", "false"))
                value = "true" if bare else _take(words, field.key)
            overrides[field.key] = value
    return CommandLine(config=config, overrides=overrides, options=own)


def _known_field(name: str, command: str, own: Sequence[str]) -> SchemaField:
    """Find the field a flag names; `-` and `_` are the same."""
    field = leaves().get(name.replace("-", "_"))
    if field is None:
        section, _, last = name.rpartition(".")
        hint = _near_in(section, last, prefix="--")
        if not hint:
            hint = nearest(f"--{name}", [f"--{key}" for key in (*own, "config")])
        raise ConfigError(
            f"--{name} is not a known flag.{hint} `qlora-kit {command} --help` lists all."
        )
    return field


def _take(words: list[str], name: str) -> str:
    """Take a flag's value off the words."""
    if not words or words[0].startswith("--"):
        raise ConfigError(f"--{name} needs a value, as in `--{name} VALUE` or `--{name}=VALUE`.")
    return words.pop(0)


def check_keys(content: Any) -> dict[str, Any]:
    """Check the names of a run file, before any value is looked at.

    Args:
        content: what the file holds.

    Returns:
        The content without empty sections.

    Raises:
        ConfigError: a key is unknown, or a section is not a mapping.

    Example:
        >>> check_keys({"model": {"path": "m"}, "train": None})
        {'model': {'path': 'm'}}
    """
    top = _top_level_names()
    if not isinstance(content, dict):
        raise ConfigError(
            f"a run file holds sections ({', '.join(top)}), got {type(content).__name__}. "
            "See examples/quickstart.yaml."
        )
    for key, value in content.items():
        if key not in top:
            hint = nearest(str(key), top) or _near_in("", str(key))
            hint = hint or f" Known: {', '.join(top)}."
            raise ConfigError(f"{key!r} is not a known key.{hint}")
        _check_section(key, value)
    return {key: value for key, value in content.items() if value is not None}


def _check_section(name: str, value: Any) -> None:
    """Check the keys of one section of a run file."""
    section = next((part for part in sections() if part.name == name), None)
    if section is None or value is None:
        return
    known = [field.key.split(".")[1] for field in section.fields]
    if not isinstance(value, dict):
        raise ConfigError(
            f"{name!r} is a section and takes keys ({', '.join(known)}), got {value!r}."
        )
    for key in map(str, value):
        if key not in known:
            hint = _near_in(name, key) or f" Known in {name!r}: {', '.join(known)}."
            raise ConfigError(f"'{name}.{key}' is not a known key.{hint}")


def _near_in(section: str, name: str, prefix: str = "") -> str:
    """Suggest a name in the same section, else the same name in another."""
    known = {key.split(".")[-1]: key for key in leaves() if key.startswith(f"{section}.")}
    ends = {key: key.split(".")[-1] for key in leaves()}
    keys = [known[key] for key in get_close_matches(name, list(known), n=1, cutoff=0.7)]
    keys = keys or [key for key, end in ends.items() if end == name]
    keys = keys or [key for key, end in ends.items() if get_close_matches(name, [end], cutoff=0.8)]
    return f" Did you mean {' or '.join(prefix + key for key in keys)}?" if keys else ""


def _top_level_names() -> list[str]:
    top, *rest = sections()
    return [section.name for section in rest] + [field.key for field in top.fields]


def flag_value(field: SchemaField, text: str) -> Any:
    """Read the text given for a flag as its field's type asks.

    Args:
        field: the field.
        text: the word on the command line.

    Returns:
        A plain value, not yet checked. A list may be written `[a, b]` or `a,b`.

    Example:
        >>> flag_value(leaves()["eval.choices"], "yes,no")
        ['yes', 'no']
        >>> flag_value(leaves()["train.learning_rate"], "2e-4")
        0.0002
    """
    from qlora_kit.cli.yaml_file import parse_yaml

    hint = field.hint
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    takes_list = any(get_origin(part) is tuple for part in parts)
    if takes_list and not text.startswith("["):
        if str not in parts:
            return [item.strip() for item in text.split(",") if item.strip()]
        return text if "," not in text or text.startswith("re:") else text.split(",")
    if str in parts and not takes_list:
        return None if text == "null" and type(None) in parts else text
    try:
        return parse_yaml(text)
    except ConfigError:
        return text  # the type check says what was expected


def build_config(content: dict[str, Any], overrides: dict[str, str] | None = None) -> RunConfig:
    """Convert and check the values.

    Args:
        content: nested plain values, as a run file holds them.
        overrides: dotted name to text, as flags give them; they win.

    Returns:
        The run's configuration.

    Raises:
        ConfigError: a name is unknown, a value has the wrong type or is out of range, or a
            required one is missing.

    Example:
        >>> content = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}
        >>> build_config(content, {"train.epochs": "2"}).train.epochs
        2.0
    """
    from jsonargparse import ArgumentParser

    merged = {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in check_keys(content).items()
    }
    for key, text in (overrides or {}).items():
        section, _, name = key.rpartition(".")
        target = merged.setdefault(section, {}) if section else merged
        target[name] = flag_value(leaves()[key], text)
    hints = get_type_hints(RunConfig)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(hints[field.name]):
            parser.add_class_arguments(hints[field.name], field.name)
        else:
            parser.add_argument(f"--{field.name}", type=hints[field.name], default=field.default)
    try:
        values = parser.instantiate(parser.parse_object(merged))
    except argparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), merged)) from error
    return RunConfig(**{field.name: values[field.name] for field in dataclasses.fields(RunConfig)})


def _explain(message: str, content: dict[str, Any]) -> str:
    """Turn jsonargparse's message into one line that says what the field takes."""
    match = re.search(r'Parser key "([^"]+)"', message)
    field = leaves().get(match[1]) if match else None
    if field is None:
        missing = re.search(r"required: (.*)", message)
        if missing:
            keys = missing[1].split(", ")
            return "; ".join(f"{key} has to be given: {leaves()[key].doc}" for key in keys)
        return " ".join(message.split())
    section, _, name = field.key.rpartition(".")
    value = (content[section] if section else content)[name]
    return f"{field.key} takes {type_text(field.hint)}, got {value!r}. {field.doc}"


def load_config(line: CommandLine, command: str) -> RunConfig:
    """Read the run file of a command line and apply its flags.

    Args:
        line: sorted words.
        command: the command's name, for messages.

    Returns:
        The run's configuration.

    Raises:
        ConfigError: see `check_keys` and `build_config`; the message names the file.
    """
    from qlora_kit.cli.yaml_file import read_yaml

    if line.config is None:
        if not line.overrides:
            raise ConfigError(
                f"qlora-kit {command} needs a run file, as in `qlora-kit {command} "
                f"examples/quickstart.yaml`. See `qlora-kit {command} --help`."
            )
        return build_config({}, line.overrides)
    content = read_yaml(line.config)
    try:
        check_keys(content)
        return build_config(content, line.overrides)
    except ConfigError as error:
        place = f"{line.config} with the flags given" if line.overrides else line.config
        raise ConfigError(f"{place}: {error}") from error


def to_yaml(config: RunConfig) -> str:
    """Write a configuration as a run file that reads back equal.

    Args:
        config: any run.

    Returns:
        YAML text with every field.

    Example:
        >>> content = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}
        >>> to_yaml(build_config(content)).splitlines()[:3]
        ['model:', '  path: m', '  bits: 4']
    """
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
