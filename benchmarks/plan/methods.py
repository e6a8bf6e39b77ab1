"""Plans of methods whose layers run the model's own code, and of full fine-tuning, held to runs.

    python -m benchmarks.plan.methods --plan FILE    # predict, without a GPU
    python -m benchmarks.plan.methods --run FILE     # measure what was predicted, recorded
    python -m benchmarks.plan.methods --again RECORD # predict a record's rows anew: no GPU

Each run is what `train` makes of it: its optimizer, its recomputation, its autocast, its
collator; random weights of a real shape and random tokens. What is predicted is what `train`
would decide by, so it comes first: it is in the file, with the commit that made it, before
anything is measured. Targets: every peak within 3%, tokens/s within 15%.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.record import write_record
from benchmarks.methods.cases import BY_NAME
from benchmarks.methods.work import Clock
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.registry import make_adapter_config
from qlora_kit.adapters.selective.full import computing_dtype
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.record import Row
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.steps import is_out_of_memory, start_counting
from qlora_kit.core.allocator import segments_grow, use_growing_segments
from qlora_kit.core.units import GIB
from qlora_kit.plan.gpus import find_gpu, recognise
from qlora_kit.plan.host import host_us_per_op
from qlora_kit.plan.predict import predict
from qlora_kit.quant.config import QuantConfig
from qlora_kit.train.arguments import training_arguments
from qlora_kit.train.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.planning import setup_of
from qlora_kit.train.record import source_commit
from qlora_kit.train.trainer import Trainer

WARMUP, STEPS = 1, 3
MOST, SPEED = 0.03, 0.15
"""Targets: each peak, each speed; relative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run that is planned, then measured."""

    case: str
    """Method and settings: of `benchmarks.methods`."""
    model: str
    batch: int
    seq: int
    recompute: bool = False
    """Whether layers are computed again in the backward."""
    optimizer: str = "adamw_torch"

    def __str__(self) -> str:
        """One line for people."""
        kept = "recompute_all" if self.recompute else "save"
        size = f"{self.batch} x {self.seq}"
        return f"{self.case:9} {self.model:13} {size:>8} {kept:14} {self.optimizer}"


_OWN = ("pfeiffer", "prefix", "glora")
RUNS = (
    *(Run(case=c, model="Llama-3.2-1B", batch=4, seq=1024, recompute=True) for c in _OWN),
    Run(case="full", model="Llama-3.2-1B", batch=1, seq=1024, recompute=True),
    *(
        Run(case="full", model="Llama-3.2-1B", batch=1, seq=1024, recompute=True, optimizer=o)
        for o in ("adamw_8bit", "paged_adamw_8bit")
    ),
    *(
        Run(case=c, model="Llama-3.2-3B", batch=1, seq=2048, recompute=again)
        for again in (True, False)
        for c in _OWN[:2]
    ),
    *(Run(case=c, model="Llama-3.2-1B", batch=4, seq=1024) for c in ("bitfit", "prompt", "top_k")),
    *(
        Run(case="glora", model="Llama-3.2-3B", batch=1, seq=2048, recompute=r)
        for r in (True, False)
    ),
)
"""The most telling ones first: time may run out."""
TOY = tuple(
    Run(case=c, model="tiny", batch=2, seq=64, recompute=c == "full") for c in (*_OWN, "full")
)
"""For machines without a GPU."""


def config_for(run: Run) -> RunConfig:
    """The run file that a run would have.

    Args:
        run: to plan or measure.

    Returns:
        Its settings; nothing is loaded by it.

    Example:
        >>> config_for(TOY[0]).method, config_for(TOY[-1]).model.bits
        ('bottleneck', 16)
    """
    case = BY_NAME[run.case]
    return RunConfig(
        model=ModelConfig(path=run.model, bits=4 if case.bits == 4 else 16),
        data=DataConfig(train="random tokens"),
        method=case.method,  # type: ignore[arg-type]
        train=TrainConfig(
            batch_size=run.batch,
            max_steps=WARMUP + STEPS + 1,
            optimizer=run.optimizer,
            gradient_checkpointing=run.recompute,
            activations="auto" if run.recompute else "save",
            loggers=(),
        ),
        **case.settings,
    )


def predicted(
    run: Run, gpu: str, memory_bytes: int | None = None, host_us: float | None = None
) -> Row:
    """What the planner says of a run.

    Args:
        run: to predict.
        gpu: a kind that the planner knows, or a device's name together with its memory.
        memory_bytes: of the device.
        host_us: microseconds per small op of its host; None for the one that plans assume.

    Returns:
        Peak, components and tokens/s, as rows name them.

    Example:
        >>> sorted(predicted(TOY[0], "h100"))[:2]
        ['predicted_components_gib', 'predicted_gib']
    """
    kind = find_gpu(gpu) if memory_bytes is None else recognise(gpu, memory_bytes)
    if host_us is not None:
        kind = replace(kind, host_us=host_us, host_measured=True)
    made = predict(
        config_of(run.model), setup_of(config_for(run), batch=run.batch, seq=run.seq), kind
    )
    return {
        "predicted_gib": made.peak_bytes / GIB,
        "predicted_components_gib": {k: v / GIB for k, v in made.components.items()},
        "predicted_tokens_per_s": made.tokens_per_s,
        "predicted_limit": made.limited_by,
    }


def forget_overrides() -> None:
    """Let bitsandbytes let go of the embeddings of optimizers that are gone.

    It holds them for as long as the process lives: 1 GiB for each model of this grid.
    """
    found = sys.modules.get("bitsandbytes")
    if found is not None:
        found.optim.GlobalOptimManager.get_instance().initialize()


def measured(run: Run) -> Row:
    """Train a run for a few updates.

    Args:
        run: to measure.

    Returns:
        Peak of the training (None without a GPU), milliseconds and tokens/s of an update, or
        `oom`.
    """
    forget_overrides()
    start_counting(None)
    left = torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else None
    try:
        return _train(run) | {"left_before_gib": left}
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"oom": True, "error": str(error).splitlines()[0][:200]}


def _train(run: Run) -> Row:
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    config, case = config_for(run), BY_NAME[run.case]
    model = random_model(
        config_of(run.model),
        QuantConfig() if case.bits == 4 else None,
        device=device,
        dtype=torch.bfloat16 if gpu else torch.float32,
    )
    adapter = attach(model, make_adapter_config(config.method, *config.settings), seed=0)
    generator = torch.Generator().manual_seed(0)
    size = run.batch * config.train.max_steps, run.seq
    ids = torch.randint(5, model.config.vocab_size, size, generator=generator).tolist()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            config,
            folder=Path(folder),
            rows=len(ids),
            device=str(model.device),
            autocast=computing_dtype(adapter.pieces),
        ).set_save(strategy="no")
        trainer = Trainer(
            model,
            adapter,
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            data_collator=PadCollator(0, 8 if gpu else 1),
            callbacks=[clock],
            step=config.train.step,
            activations="save",
        )
        trainer.train()
    took = clock.milliseconds(WARMUP)
    median = statistics.median(took)
    peak, reserved = _peaks(gpu)
    fused = trainer.fused is not None
    if trainer.fused is not None:
        trainer.fused.remove()
    return {
        "trainable": adapter.num_trainable,
        "fused": fused,
        "peak_allocated_gib": peak,
        "peak_reserved_gib": reserved,
        "ms_median": round(median, 3),
        "ms_min": round(min(took), 3),
        "ms_max": round(max(took), 3),
        "tokens_per_s": 1e3 * run.batch * run.seq / median,
        "oom": False,
    }


def _peaks(gpu: bool) -> tuple[float | None, float | None]:
    if not gpu:
        return None, None
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def table(rows: Sequence[Row]) -> str:
    """Measured beside predicted.

    Args:
        rows: of a record.

    Returns:
        Lines; the last ones say how the targets fare.

    Example:
        >>> run = asdict(TOY[0])
        >>> told = {"peak_allocated_gib": 1.0, "tokens_per_s": 100.0, "oom": False}
        >>> said = {"predicted_gib": 1.02, "predicted_tokens_per_s": 90.0, "run": run}
        >>> print(table([told | said]).splitlines()[-1])
        1 runs: peaks within 2.0% (target 3%), speeds within 10.0% (target 15%)
    """
    lines, memory, speed = [], [], []
    for row in rows:
        name = str(Run(**row["run"]))
        said, peak = row.get("predicted_gib"), row.get("peak_allocated_gib")
        if said is None or peak is None:
            what = "out of memory" if row.get("oom") else row.get("error", "not compared")
            lines.append(f"{name:70} {what}")
            continue
        memory.append(said / peak - 1)
        speed.append(row["predicted_tokens_per_s"] / row["tokens_per_s"] - 1)
        rate = f"{row['tokens_per_s']:9,.0f} tokens/s {speed[-1]:+7.1%}"
        lines.append(f"{name:70} {peak:7.2f} GiB, said {said:7.2f} {memory[-1]:+7.2%} {rate}")
    if memory:
        worst = (max(map(abs, values)) for values in (memory, speed))
        words = (
            f"{name} within {w:.1%} (target {t:.0%})"
            for name, w, t in zip(("peaks", "speeds"), worst, (MOST, SPEED), strict=True)
        )
        lines += [f"{len(memory)} runs: {', '.join(words)}"]
    return "\n".join(lines)


def _plan(file: Path, gpu: str, runs: Sequence[Run]) -> int:
    use_growing_segments()
    rows = [{"run": asdict(run), **predicted(run, gpu)} for run in runs]
    told = {"predicted_by": source_commit(), "gpu": gpu, "rows": rows}
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for run, row in zip(runs, rows, strict=True):
        print(
            run, f"{row['predicted_gib']:7.2f} GiB {row['predicted_tokens_per_s']:9,.0f} tokens/s"
        )
    return 0


def _run(file: Path, limit_seconds: float, folder: Path | None) -> int:
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    began, rows = time.monotonic(), []
    host_us = host_us_per_op("cuda" if torch.cuda.is_available() else "cpu")
    for row in told["rows"]:
        run = Run(**row["run"])
        found = row | {"predicted_by": told["predicted_by"], "growing_segments": segments_grow()}
        found["host_us_per_op"] = host_us
        if time.monotonic() - began > limit_seconds:
            found["error"] = "no time left in this run"
        else:
            found |= measured(run)
            gc.collect()
        rows.append(found)
        print(table([found]).splitlines()[0], f"{time.monotonic() - began:5.1f} s", flush=True)
        written = write_record("plan_methods", rows, folder=folder)
    print(table(rows).splitlines()[-1], written, sep="\n")
    return 0


def _again(file: Path) -> int:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    use_growing_segments()
    for row in record["rows"]:
        kind = record["gpu"], record["gpu_memory_bytes"], row.get("host_us_per_op")
        row |= predicted(Run(**row["run"]), *kind)
        row["predicted_by"] = source_commit()
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record["rows"]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, measure or predict anew."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path, metavar="FILE")
    what.add_argument("--run", type=Path, metavar="FILE")
    what.add_argument("--again", type=Path, metavar="RECORD")
    parser.add_argument("--gpu", default="h100", help="that --plan is for")
    parser.add_argument("--tiny", action="store_true", help="toys: tests the benchmark")
    parser.add_argument("--limit-seconds", type=float, default=120, help="no run starts after")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.again is not None:
        return _again(arguments.again)
    if arguments.run is not None:
        return _run(arguments.run, arguments.limit_seconds, arguments.out)
    return _plan(arguments.plan, arguments.gpu, TOY if arguments.tiny else RUNS)


if __name__ == "__main__":
    use_growing_segments()
    sys.exit(main())
