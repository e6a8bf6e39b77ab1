"""YAML as people mean it: `yes` is a word, `2e-4` is a number, and no key comes twice.

PyYAML follows YAML 1.1, where `yes`, `no`, `on` and `off` are truth values and
`2e-4` is text. Labels such as yes and no are common in fine-tuning, so this
loader follows YAML 1.2's rules for both.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.core.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's truth values and numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; a key that comes twice is refused, not overwritten."""
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(
                problem=f"the key {twice!r} comes twice", problem_mark=node.start_mark
            )
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|nan)$"),
    list("-+.0123456789"),
)


def _one_line(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the excerpt."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).split())


def parse_yaml(text: str) -> Any:
    """Read a YAML text.

    Args:
        text: one document.

    Returns:
        Plain Python values.

    Raises:
        ConfigError: the text is not YAML; the message has no file name.

    Example:
        >>> parse_yaml("{rate: 2e-4, choices: [yes, no], merge: true}")
        {'rate': 0.0002, 'choices': ['yes', 'no'], 'merge': True}
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain values only
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {_one_line(error)}") from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Args:
        path: the file, UTF-8.

    Returns:
        Plain Python values.

    Raises:
        ConfigError: the file cannot be read or is not YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error
