"""Tokens/s, MFU and memory of a training step: ours, PEFT, PEFT with Liger, Unsloth.

    python -m benchmarks.train                                  # every case, recorded
    python -m benchmarks.train --cases full small --impls qlora_kit --profile --trainer
    python -m benchmarks.train --model tiny --steps 2           # no GPU: a test of this program

All libraries train the same checkpoint (random weights of a real shape, NF4 as
bitsandbytes stores it) on the same tokens, r 16 on all seven linears, no dropout, 8-bit
AdamW, bf16, labels = inputs, each in processes of its own under the same memory cap.
Cases and targets are in cases.py, how a step is timed in harness/steps.py. Rows are kept
as they come, so a run that is cut short still writes a record of what it has.
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkpoint import MODELS, Storage, checkpoint_bytes, roomy_folder
from benchmarks.harness.flops import mfu, step_flops
from benchmarks.harness.process import Outcome, run_process
from benchmarks.harness.record import write_record
from benchmarks.harness.subject import Job, Point
from benchmarks.train.cases import CAP_GIB, CASES, IMPLS, UNSLOTH_VARIANTS, Options, plan
from benchmarks.train.child import BUILDERS, command, first_fields
from benchmarks.train.table import report

Row = dict[str, Any]
CHILD = "benchmarks.train.child"


def read_rows(file: Path) -> list[Row]:
    """Rows of a file of JSON lines; none if it is not there."""
    if not file.exists():
        return []
    return [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]


class Session:
    """One run of the benchmark: its time, its checkpoint, its rows."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        """Start the clock.

        Args:
            arguments: of the command line.
            scratch: a folder for jobs and what libraries leave behind.
        """
        self.arguments, self.scratch = arguments, scratch
        self.began = time.monotonic()
        self.rows: list[Row] = []
        self.peaks: dict[str, float] = {}

    def seconds_left(self) -> float:
        """Of the whole run."""
        return float(self.arguments.total_seconds - (time.monotonic() - self.began))

    def start(self, words: Sequence[str], environment: dict[str, str] | None = None) -> Outcome:
        """Run a fresh process."""
        limit = min(self.arguments.limit_seconds, self.seconds_left())
        return run_process(words, limit_seconds=limit, environment=environment, folder=self.scratch)

    def measure_peaks(self) -> None:
        """The card's rates, which MFU is a share of."""
        outcome = self.start([sys.executable, "-m", "benchmarks.harness.timing"])
        if outcome.reason:
            sys.exit("measuring the card's rates failed: " + "\n".join(outcome.tail))
        self.peaks = json.loads(outcome.tail[-1])
        print("peaks: " + ", ".join(f"{k} {v:.3g}" for k, v in self.peaks.items()), flush=True)

    def checkpoint(self, model: str) -> Path:
        """Make a model's checkpoint, unless a whole one is there."""
        storage: Storage = self.arguments.storage
        base = self.arguments.work or roomy_folder(checkpoint_bytes(model, storage))
        folder = Path(base).resolve() / f"{model}-{storage}"
        if (folder / "config.json").exists():
            print(f"checkpoint: {folder}", flush=True)
            return folder
        print(f"checkpoint: making {folder}", flush=True)
        words = [sys.executable, "-m", "benchmarks.harness.checkpoint", model, str(folder)]
        words += ["--storage", storage, "--dtype", self.arguments.dtype]
        outcome = self.start(words)
        if outcome.reason:
            shutil.rmtree(folder, ignore_errors=True)
            sys.exit(f"no checkpoint of {model}: {outcome.reason}\n" + "\n".join(outcome.tail))
        return folder

    def run(self, job: Job) -> None:
        """Run a job; a point that ends the process is a row, and the next ones start anew."""
        environment = importlib.import_module(BUILDERS[job.build.impl]).environment(job.build)
        left = job.points
        while left:
            if self.seconds_left() < 10:
                self._give_up(job, left, "no time left in this run")
                return
            file = self.scratch / f"rows-{len(self.rows)}.jsonl"
            file.unlink(missing_ok=True)
            now = replace(job, points=left, rows_file=str(file))
            described = self.scratch / "job.json"
            described.write_text(now.to_json(), encoding="utf-8")
            build = job.build
            print(f"{build.impl} {build.variant} {build.model} {build.method}", flush=True)
            outcome = self.start(command(CHILD, build, described), environment)
            found = read_rows(file)
            self.rows += found
            left = left[len(found) :]
            if not left:
                return
            reason = outcome.reason or "ended without a row"
            print(f"   failed: {reason}", *outcome.tail[-15:], sep="\n     ", flush=True)
            self._give_up(job, left[:1], reason)
            if not any("s  point" in line for line in outcome.stages):  # nothing was built
                self._give_up(job, left[1:], reason)
                return
            left = left[1:]

    def _give_up(self, job: Job, points: Sequence[Point], reason: str) -> None:
        self.rows += [first_fields(job.build, point) | {"error": reason} for point in points]

    def finish(self) -> int:
        """Add MFU, print the table, write the record; 1 if a row failed."""
        peak = self.peaks.get("bf16_tflops")
        for row in self.rows:
            flops = step_flops(MODELS[row["model"]], row["seq"], row["rank"], row["method"])
            row["gflops_per_token"] = flops.total / 1e9
            speed = row.get("tokens_per_s")
            row["mfu"] = mfu(speed, flops.total, peak) if speed and peak else None
            row["predicted_gib"] = None
        print("\n" + report(self.rows), flush=True)
        print(write_record("train", self.rows, peaks=self.peaks, folder=self.arguments.out))
        return 1 if any(row.get("error") for row in self.rows) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [case.name for case in CASES]
    add("--cases", nargs="+", default=names, choices=names)
    add("--impls", nargs="+", default=list(IMPLS), choices=IMPLS)
    add("--model", choices=list(MODELS), help="instead of the cases' own")
    add("--batch", type=int, help="rows per step, instead of the cases' own")
    add("--seq", type=int, help="tokens per row, instead of the cases' own")
    add("--policies", nargs="+", default=[], help="ours, instead of the cases' own")
    add("--unsloth-variants", nargs="+", default=list(UNSLOTH_VARIANTS))
    add("--step", choices=["auto", "fused", "eager"], default="auto", help="ours")
    add("--optimizer", default="adamw_8bit")
    add("--warmup", type=int, default=3)
    add("--steps", type=int, default=6, help="timed steps")
    add("--cap-gib", type=float, default=CAP_GIB, help="GPU memory for torch; 0: all of it")
    add("--limit-seconds", type=float, default=300, help="for one process")
    add("--total-seconds", type=float, default=3600, help="for the whole run")
    add("--profile", nargs="*", choices=IMPLS, help="kernels of these; qlora_kit if none is named")
    add("--trainer", action="store_true", help="also time transformers.Trainer around our step")
    add("--fresh", action="store_true", help="a process for every point")
    add("--storage", choices=["nf4", "bf16"], default="nf4", help="of the checkpoint")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if gpu else "float32")
    add("--work", type=Path, help="folder for checkpoints")
    add("--keep", action="store_true", help="keep the checkpoints")
    add("--out", type=Path, help="instead of benchmarks/results")
    return parser.parse_args(argv)


def options(arguments: argparse.Namespace) -> Options:
    """What the command line chose, as the plan needs it."""
    tiny = arguments.model == "tiny"
    profile = arguments.profile
    return Options(
        impls=tuple(arguments.impls),
        model=arguments.model,
        batch=arguments.batch or (2 if tiny else None),
        seq=arguments.seq or (32 if tiny else None),
        policies=tuple(arguments.policies),
        unsloth_variants=tuple(arguments.unsloth_variants),
        cap_gib=arguments.cap_gib or None,
        optimizer=arguments.optimizer,
        step=arguments.step,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=arguments.dtype,
        warmup=arguments.warmup,
        steps=arguments.steps,
        profile=("qlora_kit",) if profile == [] else tuple(profile or ()),
        trainer=arguments.trainer,
        fresh=arguments.fresh,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, run every job, print and record."""
    arguments = parse(argv)
    chosen = [case for case in CASES if case.name in arguments.cases]
    jobs = plan(chosen, options(arguments))
    if not torch.cuda.is_available() and arguments.model != "tiny":
        sys.exit("there is no GPU here: only --model tiny makes sense without one")
    with tempfile.TemporaryDirectory(prefix="qlora-kit-train-") as scratch:
        session = Session(arguments, Path(scratch))
        session.measure_peaks()
        for model in dict.fromkeys(job.build.model for job in jobs):
            folder = session.checkpoint(model)
            for job in (job for job in jobs if job.build.model == model):
                session.run(replace(job, build=replace(job.build, checkpoint=str(folder))))
            if not arguments.keep:
                shutil.rmtree(folder)
        return session.finish()


if __name__ == "__main__":
    sys.exit(main())
