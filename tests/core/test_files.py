"""Folders and files appear whole or not at all; memory is measured."""

import logging
import subprocess
import sys

import pytest

from qlora_kit.core.atomic import atomic_directory, atomic_write_text
from qlora_kit.core.errors import SourceError
from qlora_kit.core.log import log_once


def test_a_failed_block_leaves_nothing(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as folder:
        (folder / "half").write_text(f"{1 / 0}")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path):
    target = tmp_path / "out"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_directory(target, overwrite=True) as folder:
        (folder / "b").write_text(f"{1 / 0}")
    assert (target / "a").read_text() == "old"


def test_overwriting_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "out"
    for name in ("a", "b"):
        with atomic_directory(target, overwrite=True) as folder:
            (folder / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_refused(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_directory(target) as folder:  # empty folders may be filled
        (folder / "a").write_text("x")
    with pytest.raises(SourceError, match="already exists"), atomic_directory(target):
        pass


def test_a_file_in_the_way_is_replaced_when_allowed(tmp_path):
    target = tmp_path / "out"
    target.write_text("a file")
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "a").write_text("x")
    assert (target / "a").read_text() == "x"


def test_text_is_replaced_in_one_step(tmp_path):
    file = tmp_path / "deep" / "run.json"
    atomic_write_text(file, "one")
    atomic_write_text(file, "two")
    assert file.read_text() == "two"
    assert len(list(file.parent.iterdir())) == 1


PEAKS = """
from qlora_kit.core.memory import PeakMemory, anonymous_bytes, rss_bytes

size = 64_000_000
with PeakMemory() as memory:
    block = bytearray(b"x") * size
    del block
assert memory.start_bytes > 0
with PeakMemory() as kept:
    kept_block = bytearray(b"x") * size
assert kept.growth_bytes >= 0.9 * size, kept.growth_bytes
assert rss_bytes() >= anonymous_bytes() * 0.5
"""


def test_peak_memory_sees_what_was_freed():
    """In a process of its own: an older one may serve the block from memory it kept."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="qlora_kit"):
        for _ in range(3):
            log_once("a choice nobody else makes")
    assert [record.message for record in caplog.records] == ["a choice nobody else makes"]
