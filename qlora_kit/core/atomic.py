"""Files and folders that appear whole or not at all.

Everything is written beside its destination, flushed, and renamed in one step.
A crash leaves at most a folder whose name ends in `.partial-<pid>`, which nothing
reads.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_kit.core.errors import SourceError


@contextmanager
def atomic_directory(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder that replaces `final` only if the block succeeds.

    Args:
        final: the folder to create. Its parents are created.
        overwrite: replace an existing, non-empty `final`.

    Yields:
        A temporary sibling folder to write into.

    Raises:
        SourceError: `final` exists, is not empty, and overwrite is False.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "model"
        >>> with atomic_directory(target) as folder:
        ...     _ = (folder / "config.json").write_text("{}")
        >>> (target / "config.json").read_text()
        '{}'
    """
    if not overwrite and final.exists() and (final.is_file() or any(final.iterdir())):
        raise SourceError(
            f"{final} already exists. Choose another output folder, remove it, "
            "or allow overwriting."
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, final: Path) -> None:
    if not final.exists():
        partial.rename(final)
        return
    old = final.with_name(f"{final.name}.old-{os.getpid()}")
    final.rename(old)
    partial.rename(final)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file in one step, replacing any old one.

    Args:
        path: the file. Its parents are created.
        text: its content, encoded as UTF-8.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "run.json"
        >>> atomic_write_text(file, "{}")
        >>> file.read_text()
        '{}'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
