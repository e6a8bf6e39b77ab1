"""The package's logger, and choices that are worth saying exactly once."""

import logging

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
