"""Processes that share a GPU and time one at a time.

Importing a library, loading a model and compiling its first step take a minute or two, timing it
a few seconds. Where GPU time is short, several processes may do the former beside each other and
take turns at the latter: `QLORA_KIT_BENCH_TURNS` names a file that they lock, shared while they
prepare and alone while they time, so nothing is timed while another one prepares or times. What
is timed outside of turns (`load_s`, `first_step_s`) is then slower than alone, and rows say so
(`turns`). All of them need their memory at the same time. Without the variable nothing is locked.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

VARIABLE = "QLORA_KIT_BENCH_TURNS"
_OPEN: dict[str, TextIO] = {}
"""The file, kept open as long as this process lives: closing it would unlock it."""


def taken() -> bool:
    """Whether this process takes turns.

    Returns:
        True where the variable names a file.

    Example:
        >>> taken() == bool(os.environ.get("QLORA_KIT_BENCH_TURNS"))
        True
    """
    return bool(os.environ.get(VARIABLE))


def prepares() -> None:
    """This process prepares from here on: nobody times meanwhile; waits for who does."""
    _lock(alone=False)


@contextmanager
def alone() -> Iterator[None]:
    """Only this process times as long as the context lasts, and nobody prepares.

    Yields:
        Nothing.

    Example:
        >>> with alone():
        ...     milliseconds = 1.0
    """
    _lock(alone=True)
    try:
        yield
    finally:
        prepares()


def _lock(*, alone: bool) -> None:
    """Exchange this process's lock; the old one is given up first, so nobody waits for nobody."""
    if not taken():
        return
    import fcntl  # not on Windows

    name = os.environ[VARIABLE]
    if name not in _OPEN:
        _OPEN[name] = Path(name).open("a", encoding="utf-8")  # noqa: SIM115  closing unlocks
    fcntl.flock(_OPEN[name], fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
