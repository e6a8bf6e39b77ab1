"""Is the loss right? Real model, real data, one adapter start: ours and the peers beside float32.

    python scripts/prepare_demo.py quickstart
    python -m benchmarks.train.quality                        # ours and PEFT, 200 steps
    python -m benchmarks.train.quality --impls qlora_kit peft peft_liger unsloth --workers 4
    python -m benchmarks.train.quality --model tiny --data rows.jsonl --steps 5    # a test

Every library quantizes the same base to NF4 and trains the same adapter start on the same
batches with the same optimizer, ours with its fused step. What each loss should have been is
computed as well: by PEFT in float32 throughout, from the same 4-bit weights (each process
hashes its own, the record counts those that differ). Ours has to be within 0.005 nats of it
on average. Peers are compared with it too, and decide nothing. Two more runs of ours show what
that is worth: from another start on the same batches, which tells the scale of chance, and
from another start in another order, which has to differ by more than is allowed. Losses count
every token, or the noise of single answers would be seen.

Predicted for the demo model in bfloat16 on a GPU, 200 steps: ours 0.003 nats from float32, 0.015
over the first 20 steps; the peers, whose linears round before LoRA is added, 0.03 and 0.2
(docs/training-step.md says why).
"""

import argparse
import importlib
import json
import random
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.harness.record import ROOT, write_record
from benchmarks.train.agreement import (
    OTHER_SEED,
    OURS,
    REFERENCE,
    TOLERANCE,
    add_differences,
    count_other_weights,
    verdict,
)
from benchmarks.train.cases import IMPLS
from qlora_kit.bench.child import BUILDERS, command
from qlora_kit.bench.process import run_process
from qlora_kit.bench.random_checkpoint import write_checkpoint
from qlora_kit.bench.subject import Build
from qlora_kit.checkpoint.source import open_source
from qlora_kit.load.tokenizer import load_tokenizer
from qlora_kit.train.config import DataConfig
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.data.dataset import build_dataset

MODEL = ROOT / "demo" / "smollm2-135m-instruct.gguf"
DATA = ROOT / "demo" / "rotten_tomatoes" / "train.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training."""

    name: str
    """In the record and the figure."""
    impl: str
    seed: int
    """Of a new adapter."""
    order: int
    """Seed of the order of the rows."""
    starts_from: str | None
    """Another run's name: its start is taken."""
    dtype: str
    """Of the computation."""


def runs(impls: Sequence[str], seed: int, dtype: str) -> list[Run]:
    """What is trained, in the order of being started.

    Args:
        impls: libraries; ours is always among them.
        seed: of the start and of the order of the rows.
        dtype: of all but the reference. If that is float32, the reference is PEFT's run.

    Returns:
        Ours first, for its start; ours from other seeds, which need none; the reference; the peers.
    """
    first = Run(name=OURS, impl=OURS, seed=seed, order=seed, starts_from=None, dtype=dtype)
    other = replace(first, name="another start", seed=seed + 1)
    exact = replace(first, name=REFERENCE, impl="peft", starts_from=OURS, dtype="float32")
    done = {OURS, "peft"} if dtype == "float32" else {OURS}
    peers = [
        replace(first, name=impl, impl=impl, starts_from=OURS)
        for impl in dict.fromkeys(impls)
        if impl not in done
    ]
    return [first, other, replace(other, name=OTHER_SEED, order=seed + 1), exact, *peers]


def write_batches(
    data: Path, model: Path, file: Path, *, seed: int, arguments: argparse.Namespace
) -> int:
    """Tokenize, shuffle, pad and write the batches of one order.

    Args:
        data: rows, in any layout that `qlora-kit train` reads.
        model: folder with the tokenizer.
        file: safetensors; keys are `<step>.<input>`.
        seed: of the order.
        arguments: steps, rows per step, longest row.

    Returns:
        Predicted tokens of all batches.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        sys.exit(f"{model} has no tokenizer")
    config = DataConfig(train=str(data), max_length=arguments.length, loss_on="all")
    rows = build_dataset(config, tokenizer, "train")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    wanted = arguments.steps * arguments.batch
    order = (order * (1 + wanted // len(order)))[:wanted]
    collate = PadCollator(rows.pad_token_id, 8)
    tensors = {}
    for step in range(arguments.steps):
        chosen = order[step * arguments.batch : (step + 1) * arguments.batch]
        for name, tensor in collate([rows[index] for index in chosen]).items():
            tensors[f"{step}.{name}"] = tensor
    save_file(tensors, file)
    return sum(int((t[:, 1:] != -100).sum()) for n, t in tensors.items() if n.endswith("labels"))


def build_of(run: Run, folder: Path, scratch: Path, arguments: argparse.Namespace) -> Build:
    """What a run's process builds.

    Args:
        run: what to run.
        folder: of the base.
        scratch: holds the starts.
        arguments: rank, optimizer and the like.

    Returns:
        The build; trained weights are float32 in all of them.
    """
    return Build(
        impl=run.impl,
        variant="compile" if run.impl == "unsloth" else "",
        model=Path(arguments.model).name,
        checkpoint=str(folder),
        rank=arguments.rank,
        checkpointing=False,
        longest=arguments.length,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        adapter=str(scratch / f"start-{run.starts_from}") if run.starts_from else None,
        masters="float32",
        step=arguments.step,
        seed=run.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=run.dtype,
    )


def train(run: Run, build: Build, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in a fresh process.

    Args:
        run: what to run.
        build: of this library.
        scratch: holds the batches; gets the start and the losses.
        arguments: policy, time limit and how many run at once.

    Returns:
        `losses`, `codes`, `seconds` and `step`; or `skipped`; or `error`.
    """
    if build.adapter is not None and not Path(build.adapter).exists():
        return {"error": f"{run.starts_from} left no start"}
    stem = run.name.replace(" ", "-")
    folder = scratch / stem  # libraries leave caches where they run
    folder.mkdir()
    out = folder / "result.json"
    work = {
        "build": asdict(build),
        "policy": arguments.policy,
        "batches": str(scratch / f"batches-{run.order}.safetensors"),
        "out": str(out),
        "save_start": str(scratch / f"start-{stem}") if run.impl == OURS else None,
    }
    file = folder / "job.json"
    file.write_text(json.dumps(work), encoding="utf-8")
    module = importlib.import_module(BUILDERS[run.impl])
    print(run.name, flush=True)
    outcome = run_process(
        command("benchmarks.train.quality_child", build, file),
        limit_seconds=arguments.limit_seconds,
        environment=module.environment(build),
        folder=folder,
        show=arguments.workers == 1,
    )
    if not out.exists():
        print(f"{run.name} failed:", *outcome.tail[-15:], sep="\n     ", flush=True)
        return {"error": outcome.reason or "ended without a result"}
    print(f"{run.name}: {outcome.seconds:.0f} s, the process", flush=True)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def train_all(
    planned: Sequence[Run], folder: Path, scratch: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train, so many at once; a run that takes another's start waits for that run's end.

    Args:
        planned: what to run; a run whose start is taken comes before those that take it.
        folder: of the base.
        scratch: holds the batches.
        arguments: the command line.

    Returns:
        What `train` returned, in the order of `planned`.
    """
    ended = {run.name: threading.Event() for run in planned}

    def one(run: Run) -> dict[str, Any]:
        try:
            if run.starts_from is not None:
                ended[run.starts_from].wait()
            return train(run, build_of(run, folder, scratch, arguments), scratch, arguments)
        finally:
            ended[run.name].set()

    with ThreadPoolExecutor(arguments.workers) as pool:
        return list(pool.map(one, planned))


def rows_of(planned: Sequence[Run], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record's rows, without what all of them share.

    Args:
        planned: what was run.
        results: of each.

    Returns:
        One row per run, compared with the reference.
    """
    found = {run.name: result for run, result in zip(planned, results, strict=True)}
    exact = found[REFERENCE]
    rows = []
    for run in planned:
        row = asdict(run) | found[run.name]
        codes = row.pop("codes", None)
        if codes is not None:
            row["nf4_linears"] = len(codes)
            row["other_nf4"] = count_other_weights(codes, exact.get("codes", {}))
        rows.append(add_differences(row, exact.get("losses")))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(MODEL), help="a folder, a .gguf file, a hub id, or `tiny`")
    add("--data", type=Path, default=DATA)
    add("--impls", nargs="+", default=["qlora_kit", "peft"], choices=IMPLS)
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=8)
    add("--length", type=int, default=256, help="tokens per row, at most")
    add("--rank", type=int, default=16)
    add("--learning-rate", type=float, default=2e-4)
    add("--optimizer", default="adamw_torch")
    add("--policy", default="recompute_elementwise", help="ours")
    add("--step", choices=["auto", "fused", "eager"], default="auto", help="ours")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if gpu else "float32")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=3 if gpu else 1, help="trainings at once, on one device")
    add("--limit-seconds", type=float, default=3600, help="for one training")
    add("--out", type=Path, help="instead of benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train everything, compare, record; 1 if our loss is off or another seed's is not."""
    arguments = parse(argv)
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory(prefix="qlora-kit-quality-") as name:
        scratch = Path(name)
        if arguments.model == "tiny":
            folder = scratch / "tiny"
            write_checkpoint("tiny", folder, storage="bf16", device="cpu", dtype=dtype)
        else:
            folder = open_source(arguments.model).folder.absolute()
        for order in (arguments.seed, arguments.seed + 1):
            file = scratch / f"batches-{order}.safetensors"
            tokens = write_batches(arguments.data, folder, file, seed=order, arguments=arguments)
        planned = runs(arguments.impls, arguments.seed, arguments.dtype)
        results = train_all(planned, folder, scratch, arguments)
    rows = rows_of(planned, results)
    good, lines = verdict(rows)
    shared = {
        key: getattr(arguments, key)
        for key in ("steps", "batch", "length", "rank", "learning_rate", "optimizer", "workers")
    }
    shared |= {"model": Path(arguments.model).name, "data": arguments.data.name}
    shared |= {"predicted_tokens": tokens, "policy": arguments.policy, "tolerance": TOLERANCE}
    print("\n".join(lines), flush=True)
    print(write_record("train_quality", [shared | row for row in rows], folder=arguments.out))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
