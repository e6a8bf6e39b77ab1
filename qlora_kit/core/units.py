"""Bytes as people write them.

Binary units (`KiB`, `MiB`, `GiB`, `TiB`) are powers of 1024, decimal ones
(`KB`, `MB`, `GB`, `TB`) powers of 1000. Output is always binary, because that
is what GPU tools show.
"""

import re

from qlora_kit.core.errors import ConfigError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Read a size such as `"44GiB"`, `"5 GB"` or `1048576`.

    Args:
        text: a number of bytes, or a number with a unit (case does not matter).

    Returns:
        The size in bytes, rounded down.

    Raises:
        ConfigError: the text is not a size.

    Example:
        >>> parse_bytes("1.5KiB"), parse_bytes("5GB")
        (1536, 5000000000)
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _FACTORS:
        raise ConfigError(
            f"{text!r} is not a size. Write a number with a unit, such as 44GiB, 500MiB or 5GB."
        )
    return int(float(match[1]) * _FACTORS[match[2].lower()])


def format_bytes(size_bytes: float) -> str:
    """Write a size with the largest binary unit that keeps it at or above one.

    Args:
        size_bytes: the size; negative for a decrease.

    Returns:
        Text such as `"3.35 GiB"`; plain bytes below 1 KiB.

    Example:
        >>> format_bytes(3.5 * 1024**3), format_bytes(12)
        ('3.50 GiB', '12 B')
    """
    for unit, factor in (("TiB", 1024**4), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"
