"""What of all the logging reaches the terminal.

This package's own messages (choices made automatically, each said once) are shown.
Libraries speak up from WARNING on, but for one false alarm.
"""

import logging
import sys


class _ToStandardError(logging.Handler):
    """Standard error as it is when a line comes: whoever calls a command may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        print(self.format(record), file=sys.stderr)


def setup_logging() -> None:
    """Send this package's log lines to standard error; called by commands that do work.

    Example:
        >>> setup_logging()
        >>> logging.getLogger("qlora_kit").level == logging.INFO
        True
    """
    logger = logging.getLogger("qlora_kit")
    if not logger.handlers:
        handler = _ToStandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # On a CPU bitsandbytes complains at import that the optional package `kernels` is missing. It
    # would serve bitsandbytes' own 4-bit layers, which we do not use.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)


def quiet_progress() -> None:
    """Turn transformers' progress bars off where they would fill a file; imports transformers.

    Example:
        >>> quiet_progress()
    """
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
