"""`qlora-kit train` with its plan: what it takes beside what it said, and where memory runs out.

    python -m benchmarks.plan.train                 # about a minute and a half on an H100, recorded
    python -m benchmarks.plan.train --only 6GiB     # one of them

Every run is the command itself on a model of random weights, in a process of its own, evaluation
included: held-out rows in batches asked to be eight times as large as training's. On the whole
card and under budgets, which torch enforces, it must end well, within 3% of the peak it
predicted. A run without a plan must run out of memory and stop with the planner's table, and with
settings that fit; one that does not fit must be refused before its model is loaded, with settings
that do or a word that none near it does.

Importing the libraries takes longer than a run, so all processes import at once and then wait
for their turn; each has the GPU for itself while it runs.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.harness.record import write_record
from qlora_kit.bench.process import import_path
from qlora_kit.bench.random_checkpoint import checkpoint_bytes, roomy_folder
from qlora_kit.bench.record import Row
from qlora_kit.bench.session import Session
from qlora_kit.core.allocator import growing_segments

MOST = 0.03
"""Target: how far a peak may be from what was predicted, relative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One command."""

    name: str
    flags: tuple[str, ...]
    """Besides those that all have."""
    code: int = 0
    """Exit status it must have."""


_FOUR = ("--train.batch_size", "4")
RUNS = (
    Run(name="whole card", flags=_FOUR),
    Run(name="6GiB", flags=(*_FOUR, "--budget", "6GiB")),
    Run(
        name="out of memory",
        flags=(
            *("--train.batch_size", "24", "--train.activations", "save"),
            *("--plan", "off", "--budget", "12GiB"),
        ),
        code=2,
    ),
    Run(name="refused", flags=(*_FOUR, "--budget", "2GiB"), code=2),
    Run(name="4GiB", flags=(*_FOUR, "--budget", "4GiB")),
)
"""The most telling ones first: time may run out."""
TOY = (Run(name="toy", flags=("--train.batch_size", "2", "--model.device", "cpu")),)
"""For machines without a GPU, where nothing is planned."""
MODEL, SEQ, TOY_SEQ = "Llama-3.2-1B", 2048, 64
_LINES = re.compile(r"training peak|memory will be tight|differ|^ *plan\b", re.IGNORECASE)
"""What is kept of a run that ends well."""
_STOPPED = re.compile(r"^qlora-kit: ", re.MULTILINE)
"""Where the message of one begins that does not."""
_NEAREST = re.compile(r"^  --\w", re.MULTILINE)
"""A line of settings that fit."""


def write_rows(file: Path, count: int, words: int) -> None:
    """Write texts to train on.

    Args:
        file: of JSON lines.
        count: rows.
        words: of each.
    """
    chosen = random.Random(0)
    kinds = ("four", "bits", "frozen", "adapter", "card")
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            text = " ".join(chosen.choice(kinds) for _ in range(words))
            lines.write(json.dumps({"text": text}) + "\n")


def words_of(run: Run, checkpoint: Path, folder: Path, seq: int) -> list[str]:
    """The command line of a run, after `qlora-kit`.

    Args:
        run: what differs.
        checkpoint: the model's folder.
        folder: with the rows; the run writes into it.
        seq: tokens of a row.

    Returns:
        Words.

    Example:
        >>> words_of(TOY[0], Path("m"), Path("f"), 64)[:3]
        ['train', '--model.path', 'm']
    """
    rows = str(folder / "rows.jsonl")
    common = {
        "model.path": checkpoint,
        "data.train": rows,
        "data.eval": rows,
        "data.limit_eval": 32,
        "data.packing": "true",
        "data.max_length": seq,
        "eval.batch_size": 32,
        "eval.before": "false",
        "eval.samples": 0,
        "train.max_steps": 6,
        "train.log_every": 1,
        "train.eval_every": 3,
        "train.optimizer": "adamw_8bit",
        "train.loggers": "[]",
        "output": folder / run.name.replace(" ", "-"),
        "overwrite": "true",
    }
    pairs = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    return ["train", *pairs, *run.flags]


class Waiting:
    """A process that has imported everything and waits for its turn."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        """Start it.

        Args:
            words: after `qlora-kit`.
            log: what it prints.
        """
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "110"}
        self._log: IO[str] = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.plan.train", "--child", *words],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": import_path(), **offline, **growing_segments()},
        )

    def go(self, limit_seconds: float) -> tuple[int | None, float]:
        """Let it run.

        Args:
            limit_seconds: then it is ended.

        Returns:
            code: its exit status; None if it was ended.
            seconds: it took from here.
        """
        began = time.monotonic()
        code: int | None = None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed before its turn
            self._process.stdin.write("go\n")
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(limit_seconds)
        self.end()
        return code, time.monotonic() - began

    def end(self) -> None:
        """End it, if it has not."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


def child(words: Sequence[str]) -> None:
    """Import everything, wait for a line, run the command; never returns.

    Args:
        words: after `qlora-kit`.
    """
    from qlora_kit.cli.main import entry

    for name in ("qlora_kit.train.run", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    if not sys.stdin.readline():
        raise SystemExit("nobody is waiting for this run")
    sys.argv = ["qlora-kit", *words]
    entry()


def told(run: Run, text: str, folder: Path, names: dict[str, str]) -> Row:
    """What a run has printed and recorded.

    Args:
        run: that ended.
        text: of its log.
        folder: it wrote into.
        names: of folders, to what stands for them.

    Returns:
        The row's fields.
    """
    for path, name in names.items():
        text = text.replace(path, name)
    row: Row = {"run": run.name, "flags": list(run.flags), "expected_exit": run.code}
    stopped = _STOPPED.search(text)
    if stopped is not None:
        row["printed"] = text[stopped.start() :].splitlines()
        row["settings_that_fit"] = len(_NEAREST.findall(text))
    else:
        row["printed"] = [line for line in text.splitlines() if _LINES.search(line)]
    file = folder / run.name.replace(" ", "-") / "run.json"
    if not file.exists():
        return row
    record = json.loads(file.read_text(encoding="utf-8"))
    history = record["training"]["history"]
    lines = [line for line in history if "tokens_per_s" in line]
    return row | {
        "plan": record["plan"],
        "stages": {stage["name"]: stage["seconds"] for stage in record["stages"]},
        "tokens_per_s": [line["tokens_per_s"] for line in lines],
        "evaluations": sum("eval_loss" in line for line in history),
        "growing_segments": record["environment"].get("growing_segments"),
    }


def complaint(row: Row) -> str | None:
    """What a run did that it must not.

    Args:
        row: of a record.

    Returns:
        A clause; None if all is well.

    Example:
        >>> row = {"exit": 0, "expected_exit": 0, "evaluations": 2, "plan": {"difference": 0.05}}
        >>> complaint(row)
        'its peak was 5.0% off'
    """
    if row["exit"] != row["expected_exit"]:
        return f"exit status {row['exit']} instead of {row['expected_exit']}"
    if row["exit"]:
        if not any("needed on the GPU" in line for line in row["printed"]):
            return "no table"
        said = row["settings_that_fit"] or any("nothing near" in line for line in row["printed"])
        return None if said else "no settings that fit"
    if not row["evaluations"]:
        return "nothing was evaluated"
    plan = row.get("plan")
    if plan is not None and abs(plan["difference"]) > MOST:
        return f"its peak was {abs(plan['difference']):.1%} off"
    return None


def table(rows: Sequence[Row]) -> str:
    """A line a run.

    Args:
        rows: of a record.

    Returns:
        Lines.
    """
    lines = []
    for row in rows:
        line = f"{row['run']:14} exit {row['exit']} {row['seconds']:6.1f} s  "
        plan = row.get("plan")
        if plan:
            said = plan["predicted"]
            line += f"{said['setup']['activations']}, {said['setup']['keep_decoded']} decoded: "
            line += f"{plan['predicted_gib']:.2f} GiB said, {plan['measured_gib']:.2f} measured "
            line += f"({plan['difference']:+.1%}), {said['tokens_per_s']:,.0f} tokens/s said, "
            line += f"{statistics.median(row['tokens_per_s'][-2:]):,.0f} at the end"
        elif row["exit"]:
            line += f"{row.get('settings_that_fit', 0)} settings that fit"
        wrong = complaint(row)
        lines.append(line + (f"  WRONG: {wrong}" if wrong else ""))
    return "\n".join(lines)


def measure(
    runs: Sequence[Run], scratch: Path, *, gpu: bool, limit_seconds: float, total_seconds: float
) -> Iterator[Row]:
    """Do runs one after the other.

    Args:
        runs: what to do.
        scratch: an empty folder.
        gpu: whether there is one; else a toy is trained.
        limit_seconds: of one run.
        total_seconds: no run starts after.

    Yields:
        A row each, when it is there.
    """
    began = time.monotonic()
    seq, model = (SEQ, MODEL) if gpu else (TOY_SEQ, "tiny")
    write_rows(scratch / "rows.jsonl", 80, seq + seq // 2)
    session = Session(scratch, limit_seconds=limit_seconds, total_seconds=total_seconds)
    checkpoint = scratch / f"{model}-nf4"
    logs = [scratch / f"{index}.log" for index in range(len(runs))]
    pairs = list(zip(runs, logs, strict=True))
    waiting = [Waiting(words_of(run, checkpoint, scratch, seq), log) for run, log in pairs]
    try:
        dtype = "bfloat16" if gpu else "float32"
        session.checkpoint(model, storage="nf4", dtype=dtype, work=scratch)
        for (run, log), process in zip(pairs, waiting, strict=True):
            if time.monotonic() - began > total_seconds:
                break
            code, seconds = process.go(limit_seconds)
            names = {str(checkpoint): model, str(scratch): "."}
            text = log.read_text(encoding="utf-8", errors="replace")
            row = told(run, text, scratch, names)
            row = {"model": model, **row, "exit": code, "seconds": round(seconds, 1)}
            print(table([row]), flush=True)
            if complaint(row):
                print(*text.splitlines()[-15:], sep="\n    ", flush=True)
            yield row
    finally:
        for process in waiting:
            process.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print, write the record; 1 if a run did what it must not."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["--child"]:
        child(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the runs")
    parser.add_argument("--limit-seconds", type=float, default=60, help="of one run")
    parser.add_argument("--total-seconds", type=float, default=300, help="no run starts after")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results")
    arguments = parser.parse_args(words)
    gpu = torch.cuda.is_available()
    runs = [r for r in (RUNS if gpu else TOY) if arguments.only is None or r.name in arguments.only]
    limits: dict[str, Any] = {"limit_seconds": arguments.limit_seconds}
    limits["total_seconds"] = arguments.total_seconds
    rows: list[Row] = []
    place = Path(roomy_folder(checkpoint_bytes(MODEL, "nf4")))
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        try:
            for row in measure(runs, Path(folder), gpu=gpu, **limits):
                rows.append(row)
                print(write_record("plan_train", rows, folder=arguments.out), flush=True)
        except KeyboardInterrupt:
            print("cut short: what was measured is recorded", flush=True)
    print(table(rows))
    return 1 if not rows or any(complaint(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
