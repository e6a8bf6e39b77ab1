"""How module names are selected: by suffix, or by regular expression.

A pattern `q_proj` or `self_attn.q_proj` matches a module whose dotted name ends
with these whole parts. A pattern that starts with `re:` is a regular expression
that must match the whole dotted name. One rule for quantization (`skip`,
`target`) and for adapters (`targets`, `rank_pattern`).
"""

import re
from collections.abc import Iterable

from qlora_kit.core.errors import ConfigError


def matches(name: str, pattern: str) -> bool:
    """Tell whether one pattern selects a module.

    Args:
        name: dotted module name, such as `model.layers.0.self_attn.q_proj`.
        pattern: a suffix of whole parts, or `re:` and a regular expression.

    Returns:
        True if the pattern selects the module.

    Raises:
        ConfigError: the regular expression is malformed.

    Example:
        >>> matches("layers.0.self_attn.q_proj", "q_proj")
        True
        >>> matches("layers.0.self_attn.q_proj", "proj")
        False
        >>> matches("layers.10.mlp.up_proj", r"re:layers\\.\\d+\\.mlp\\..*")
        True
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ConfigError(
                f"the pattern {pattern!r} is not a regular expression: {error}. "
                "Escape special characters, or drop `re:` to match a name's ending."
            ) from error
    return name == pattern or name.endswith(f".{pattern}")


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether any of several patterns selects a module.

    Args:
        name: dotted module name.
        patterns: see `matches`.

    Returns:
        True if at least one pattern selects the module.

    Example:
        >>> matches_any("model.lm_head", ("embed_tokens", "lm_head"))
        True
    """
    return any(matches(name, pattern) for pattern in patterns)
