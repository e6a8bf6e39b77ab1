"""Processes that take turns: none times while another one prepares or times."""

import os
import subprocess
import sys
import time

import pytest

from qlora_kit.bench.turns import VARIABLE

CHILD = """
import sys, time
from pathlib import Path
from qlora_kit.bench.turns import alone, prepares, taken
log = Path(sys.argv[1]).open("a", buffering=1)
while len(list(Path(sys.argv[1]).parent.glob("*.log"))) < 3:  # all of them begin together
    time.sleep(0.005)
prepares()
for turn in range(3):
    for kind in ("prepares", "times"):
        if kind == "times":
            with alone():
                began = time.monotonic()
                time.sleep(0.03)
                log.write(f"{kind} {began} {time.monotonic()}\\n")
        else:
            began = time.monotonic()
            time.sleep(0.03)
            log.write(f"{kind} {began} {time.monotonic()}\\n")
"""


def overlaps(tmp_path, environment):
    """How often a process that timed had another one beside it, of three processes."""
    tmp_path.mkdir(exist_ok=True)
    script, logs = tmp_path / "child.py", [tmp_path / f"{n}.log" for n in range(3)]
    script.write_text(CHILD)
    words = [sys.executable, str(script)]
    started = [subprocess.Popen([*words, str(log)], env=environment) for log in logs]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    spans = []
    for who, log in enumerate(logs):
        lines = [line.split() for line in log.read_text().splitlines()]
        assert len(lines) == 6
        spans += [(who, kind, float(begin), float(end)) for kind, begin, end in lines]
    return sum(
        one[1] == "times" and one[0] != other[0] and one[2] < other[3] and other[2] < one[3]
        for one in spans
        for other in spans
    )


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    return {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}


def test_nobody_is_beside_who_times(tmp_path, environment):
    began = time.monotonic()
    assert overlaps(tmp_path, environment | {VARIABLE: str(tmp_path / "turns")}) == 0
    assert time.monotonic() - began > 9 * 0.03  # nine turns, one after the other
    assert overlaps(tmp_path / "unlocked", environment) > 0
