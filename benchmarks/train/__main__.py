"""Tokens/s, MFU and memory of a training step: ours, PEFT, PEFT with Liger, Unsloth.

    python -m benchmarks.train                                  # every case, recorded
    python -m benchmarks.train --cases full small --impls qlora_kit --profile --trainer
    python -m benchmarks.train --model tiny --steps 2           # no GPU: a test of this program

All libraries train the same checkpoint (random weights of a real shape, NF4 as
bitsandbytes stores it) on the same tokens, r 16 on all seven linears, no dropout, 8-bit
AdamW, bf16, labels = inputs, each in processes of its own under the same memory cap.
Cases and targets are in cases.py, how a step is timed in qlora_kit/bench/steps.py. Rows are kept
as they come, so a run that is cut short still writes a record of what it has.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness.interrupt import interruptible
from benchmarks.harness.record import write_record
from benchmarks.train.cases import CAP_GIB, CASES, IMPLS, UNSLOTH_VARIANTS, Options, plan
from benchmarks.train.here import Here
from benchmarks.train.table import report
from qlora_kit.bench.flops import mfu, step_flops
from qlora_kit.bench.session import Session, StepFailedError
from qlora_kit.bench.shapes import MODELS
from qlora_kit.bench.subject import Job
from qlora_kit.core.allocator import use_growing_segments


def finish(session: Session, out: Path | None) -> int:
    """Add MFU, print the table, write the record; 1 if a row failed."""
    peak = session.peaks.get("bf16_tflops")
    for row in session.rows:
        flops = step_flops(MODELS[row["model"]], row["seq"], row["rank"], row["method"])
        row["gflops_per_token"] = flops.total / 1e9
        speed = row.get("tokens_per_s")
        row["mfu"] = mfu(speed, flops.total, peak) if speed and peak else None
        row["predicted_gib"] = None
    print("\n" + report(session.rows), flush=True)
    print(write_record("train", session.rows, peaks=session.peaks, folder=out))
    return 1 if any(row.get("error") for row in session.rows) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [case.name for case in CASES]
    add("--cases", nargs="+", default=names, choices=names, help="run in this order")
    add("--impls", nargs="+", default=list(IMPLS), choices=IMPLS)
    add("--model", choices=list(MODELS), help="instead of the cases' own")
    add("--batch", type=int, help="rows per step, instead of the cases' own")
    add("--seq", type=int, help="tokens per row, instead of the cases' own")
    add("--policies", nargs="+", default=[], help="ours, instead of the cases' own")
    add("--ours-rows", nargs="+", default=[], help="of a case's rows these, as full/4")
    add("--unsloth-variants", nargs="+", default=list(UNSLOTH_VARIANTS))
    add(
        "--unsloth-rows", nargs="+", default=[], help="these, as compile/save, or best/compile/save"
    )
    add("--step", choices=["auto", "fused", "eager"], default="auto", help="ours")
    add("--optimizer", default="adamw_8bit")
    add("--warmup", type=int, default=3)
    add("--steps", type=int, default=6, help="timed steps")
    add("--cap-gib", type=float, default=CAP_GIB, help="GPU memory for torch; 0: all of it")
    add("--limit-seconds", type=float, default=300, help="for one process")
    add("--total-seconds", type=float, default=3600, help="for the whole run")
    add("--profile", nargs="*", choices=IMPLS, help="kernels of these; qlora_kit if none is named")
    add("--trainer", action="store_true", help="also time transformers.Trainer around our step")
    add(
        "--peaks",
        type=Path,
        help="a record of this card, minutes ago: its rates, not measured anew",
    )
    add("--here", action="store_true", help="ours in this process, peers in theirs as ever")
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
        ours_rows=tuple(arguments.ours_rows),
        unsloth_variants=tuple(arguments.unsloth_variants),
        unsloth_rows=tuple(arguments.unsloth_rows),
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
    cases = {case.name: case for case in CASES}
    chosen = [cases[name] for name in dict.fromkeys(arguments.cases)]
    jobs = plan(chosen, options(arguments))
    if not torch.cuda.is_available() and arguments.model != "tiny":
        sys.exit("there is no GPU here: only --model tiny makes sense without one")
    with tempfile.TemporaryDirectory(prefix="qlora-kit-train-") as scratch:
        session = (Here if arguments.here else Session)(
            Path(scratch),
            limit_seconds=arguments.limit_seconds,
            total_seconds=arguments.total_seconds,
        )
        if arguments.here:
            use_growing_segments()
        try:
            measure(session, jobs, arguments)
        except (StepFailedError, KeyboardInterrupt) as reason:
            print(f"stopped: {str(reason) or 'interrupted'}", flush=True)
            if not session.rows:
                return 1
        if isinstance(session, Here):
            session.last()
        return finish(session, arguments.out)


def measure(session: Session, jobs: Sequence[Job], arguments: argparse.Namespace) -> None:
    """Rates of the card, checkpoints and jobs; rows are the session's as they come.

    Args:
        session: that runs them.
        jobs: in their order.
        arguments: of the command line.
    """
    if arguments.peaks is None:
        session.measure_peaks()
    else:
        session.peaks = json.loads(arguments.peaks.read_text(encoding="utf-8"))["peaks"]
    for model in dict.fromkeys(job.build.model for job in jobs):
        folder = session.checkpoint(
            model, storage=arguments.storage, dtype=arguments.dtype, work=arguments.work
        )
        for job in (job for job in jobs if job.build.model == model):
            session.run(replace(job, build=replace(job.build, checkpoint=str(folder))))
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    interruptible()
    sys.exit(main())
