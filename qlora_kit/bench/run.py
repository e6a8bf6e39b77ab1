"""One run of `qlora-kit bench memory` or `bench speed`: from options to a record and reports.

    FOLDER/rows.jsonl   one measurement a line, as they come
    FOLDER/record.json  everything: see `record.py`
    FOLDER/report.md, FOLDER/report.html

The record is written before anything is predicted or drawn from it, so that neither can lose
what was measured.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_kit.bench.flops import mfu, step_flops
from qlora_kit.bench.grid import Options, merged, without_known
from qlora_kit.bench.html import render_html
from qlora_kit.bench.markdown import render_markdown
from qlora_kit.bench.methods import PEERS
from qlora_kit.bench.predicted import add_predictions
from qlora_kit.bench.record import Row, make_record
from qlora_kit.bench.rows import identity, mark_disagreements, measured
from qlora_kit.bench.session import Session
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.subject import Job, write_row
from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.train.record import source_commit

PEER_IMPLS = frozenset(method.impl for method in PEERS.values())

TINY_NOTE = (
    "There is no GPU here: a tiny model ran on the CPU in float32. That tests this program; no "
    "figure below says anything about a GPU."
)
HOST_NOTE = "Memory is that of the whole process on the host, Python and libraries included."


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds a run may take."""

    process: float = 300.0
    """One process."""
    total: float = 3600.0
    """All of them; what is left then is recorded as not measured."""


def for_this_machine(options: Options) -> Options:
    """What can be run here: without a GPU the tiny model, in float32.

    Args:
        options: what a user chose.

    Returns:
        Themselves, or the same methods and policies at a size that a CPU does in seconds.

    Example:
        >>> wanted = Options(models=("tiny",), batches=(2,), seqs=(64,))
        >>> for_this_machine(wanted).models
        ('tiny',)
    """
    if torch.cuda.is_available():
        return options
    return replace(
        options,
        models=("tiny",),
        batches=(2,),
        seqs=(64,),
        graphs="off",
        rank=min(options.rank, 8),
        cap_gib=None,
        device="cpu",
        dtype="float32",
    )


def run_bench(
    bench: str,
    rounds: Sequence[Options],
    folder: Path,
    *,
    command: str,
    limits: Limits,
    work: Path | None = None,
    earlier: Sequence[Row] = (),
    together: bool = False,
) -> dict[str, Any]:
    """Measure, and write the record and its reports.

    Args:
        bench: `memory` or `speed`.
        rounds: what to measure, the most important first; same device and dtype.
        folder: created; a record in it is replaced.
        command: what the user typed, for the record.
        limits: of time.
        work: folder for the checkpoints that peers need, which stay there; None for a temporary
            one with enough room.
        earlier: rows of this card's earlier records: they are put into this one, and what they
            measured is not measured again.
        together: one process per model, without peers, instead of one per method as well.

    Returns:
        The record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "rows.jsonl"
    lines.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="qlora-kit-bench-") as scratch:
        session = Session(
            Path(scratch),
            limit_seconds=limits.process,
            total_seconds=limits.total,
            on_row=lambda row: write_row(lines, row),
        )
        session.measure_peaks()
        jobs = without_known(merged(rounds), earlier)
        count = sum(len(job.points) for job in jobs)
        print(f"{count} measurements of {len(jobs)} models and methods", flush=True)
        try:
            for model in dict.fromkeys(job.build.model for job in jobs):
                mine = [job for job in jobs if job.build.model == model]
                if together:
                    session.run_together(mine)
                else:
                    _run_model(session, model, mine, rounds[0].dtype, work)
        except KeyboardInterrupt:
            print("interrupted: recording what was measured", flush=True)
    for row in session.rows:
        _complete(row, session.peaks)
    if any(row["impl"] in PEER_IMPLS for row in session.rows):  # who is on 4 bits shares weights
        mark_disagreements([row for row in session.rows if row["bits"] == 4])
    new = {identity(row) for row in session.rows if row.get("tokens_per_s")}
    kept = [row for row in measured(earlier) if identity(row) not in new]
    record = record_of(bench, [*kept, *session.rows], command, session.peaks)
    if rounds[0].device == "cpu":
        record["note"] = f"{TINY_NOTE} {HOST_NOTE}"
    write_reports(record, folder)
    add_predictions(record)
    write_reports(record, folder)
    return record


def record_of(
    bench: str, rows: list[Row], command: str, peaks: dict[str, float] | None = None
) -> dict[str, Any]:
    """A record of this version of the package.

    Args:
        bench: its name.
        rows: one measurement each.
        command: what the user typed.
        peaks: rates of the card, if they were measured.

    Returns:
        The record. `QLORA_KIT_COMMIT` names the commit where there is no git.
    """
    commit = os.environ.get("QLORA_KIT_COMMIT") or source_commit()
    dirty = bool(commit and commit.endswith("-dirty"))
    return make_record(bench, rows, commit=commit, dirty=dirty, command=command, peaks=peaks)


def _run_model(
    session: Session, model: str, jobs: Sequence[Job], dtype: str, work: Path | None
) -> None:
    """All jobs of a model; a checkpoint for everybody on 4 bits where peers are among them."""
    if not any(job.build.impl in PEER_IMPLS for job in jobs):
        for job in jobs:
            session.run(job)
        return
    place = session.checkpoint(model, storage="nf4", dtype=dtype, work=work)
    try:
        for job in jobs:
            stored = str(place) if job.build.bits == 4 else ""
            session.run(replace(job, build=replace(job.build, checkpoint=stored)))
    finally:
        if work is None:
            shutil.rmtree(place)


def _complete(row: Row, peaks: dict[str, float]) -> None:
    """Add the FLOPs of a token, and the share of the card's rate that they reach."""
    config, peak = config_of(row["model"]), peaks.get("bf16_tflops")
    row["gflops_per_token"] = row["mfu"] = None
    dense = hasattr(config, "intermediate_size") and not hasattr(config, "num_experts")
    if not dense or not hasattr(config, "num_key_value_heads"):
        return
    flops = step_flops(config, row["seq"], row["rank"], row["method"])
    row["gflops_per_token"] = flops.total / 1e9
    speed = row.get("tokens_per_s")
    row["mfu"] = mfu(speed, flops.total, peak) if speed and peak else None


def write_reports(record: dict[str, Any], folder: Path) -> None:
    """Write a record and what is made from it.

    Args:
        record: of memory or speed.
        folder: exists.
    """
    atomic_write_text(folder / "record.json", json.dumps(record, indent=1) + "\n")
    atomic_write_text(folder / "report.md", render_markdown(record))
    atomic_write_text(folder / "report.html", render_html(record))
