"""The package's logger, and choices that are worth saying exactly once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("qlora_kit")

_said: set[str] = set()


def log_once(message: str) -> None:
    """Log a choice made automatically, the first time it is made.

    Args:
        message: one sentence; the same text is never logged twice in a process.

    Example:
        >>> log_once("nf4_linear: using the reference backend")
    """
    if message not in _said:
        _said.add(message)
        logger.info(message)


@contextmanager
def unsaid() -> Iterator[None]:
    """Say nothing for a while, and afterwards what would have been said before.

    For steps that are traced and not run: what they choose is not what a run will.

    Yields:
        Nothing.

    Example:
        >>> with unsaid():
        ...     log_once("norms: using the outline")
        >>> "norms: using the outline" in _said
        False
    """
    level, before = logger.level, set(_said)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        _said.intersection_update(before)
