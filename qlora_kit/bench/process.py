"""A fresh process with a time limit, its progress shown while it runs.

Peers patch transformers, kernels are cached and memory is fragmented by whoever ran
before: what is compared runs in processes of its own. Lines that start with the mark of
`Stage` are shown as they come; the rest is kept for the case that something goes wrong.
"""

import os
import queue
import signal
import site
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import qlora_kit
from qlora_kit.bench.subject import STAGE_MARK

_KEPT_LINES = 40
_GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a process ended."""

    code: int
    """Exit status; negative for a signal."""
    timed_out: bool
    """It was stopped at its limit."""
    seconds: float
    """How long it ran."""
    tail: tuple[str, ...]
    """Its last lines that were not shown."""
    stages: tuple[str, ...]
    """Its stage lines."""

    @property
    def reason(self) -> str:
        """One line on why it failed; empty if it did not."""
        if self.timed_out:
            return f"stopped after {self.seconds:.0f} s"
        if self.code == 0:
            return ""
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name} (out of host memory?)"
        last = [line for line in self.tail if line.strip()]
        return last[-1].strip()[:300] if last else f"exit status {self.code}"


def import_path() -> str:
    """`PYTHONPATH` for a process that has to find the modules this one runs.

    Returns:
        This process's own, with the folder that holds the package in front where an interpreter
        would not look by itself: in a checkout, of which the benchmarks can then be imported too.

    Example:
        >>> isinstance(import_path(), str)
        True
    """
    home = str(Path(qlora_kit.__file__).resolve().parents[1])
    known = [*site.getsitepackages(), site.getusersitepackages()]
    installed = any(Path(folder).resolve() == Path(home) for folder in known)
    folders = ("" if installed else home, os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(filter(None, folders))


def run_process(
    command: Sequence[str],
    *,
    limit_seconds: float,
    folder: Path,
    environment: dict[str, str] | None = None,
    show: bool = True,
) -> Outcome:
    """Run a command and wait for it; what this process can import can be imported there.

    Args:
        command: program and arguments.
        limit_seconds: then the process and its children are ended.
        folder: where it runs; libraries leave their caches there.
        environment: variables added to this process's.
        show: print its stage lines as they come.

    Returns:
        How it ended; never raises for a failure of the command.

    Example:
        >>> import sys
        >>> words = [sys.executable, "-c", "raise SystemExit('no GPU')"]
        >>> run_process(words, limit_seconds=30, folder=Path.cwd()).reason
        'no GPU'
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": import_path(),
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    tail: deque[str] = deque(maxlen=_KEPT_LINES)
    stages: list[str] = []
    timed_out = False
    try:
        while True:
            left = limit_seconds - (time.monotonic() - began)
            if left <= 0:
                timed_out = True
                break
            try:
                line = lines.get(timeout=left)
            except queue.Empty:
                continue
            if line is None:
                break
            if line.startswith(STAGE_MARK):
                stages.append(line.rstrip())
                if show:
                    print("   " + line.rstrip(), flush=True)
            else:
                tail.append(line.rstrip())
    except KeyboardInterrupt:
        _end(process)
        raise
    if timed_out:
        _end(process)
    code = process.wait()
    return Outcome(
        code=code,
        timed_out=timed_out,
        seconds=time.monotonic() - began,
        tail=tuple(tail),
        stages=tuple(stages),
    )


def _read(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]") -> None:
    """Hand every line on; None at the end."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and everything it started."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, which)
            process.wait(_GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        else:
            return
