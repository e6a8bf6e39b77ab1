"""Is the loss the same? Real model, real data, one adapter start: ours beside the peers.

    python scripts/prepare_demo.py quickstart
    python -m benchmarks.train.quality                        # ours and PEFT, 200 steps
    python -m benchmarks.train.quality --impls qlora_kit peft peft_liger unsloth
    python -m benchmarks.train.quality --model tiny --data rows.jsonl --steps 5    # a test

Every library quantizes the same base to NF4 and trains the same adapter start on the same
batches with the same optimizer, ours with its fused step. The loss of every step has to be
PEFT's within 0.005 nats on average. What that is worth is shown by two more runs of ours:
from another start on the same batches, and from another start in another order; both have
to differ by more. Losses count every token, or the noise of single answers would be seen.
"""

import argparse
import importlib
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.harness.record import ROOT, write_record
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

TOLERANCE = 0.005
"""Nats, on average over the steps."""
REFERENCE = "peft"
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


def runs(impls: Sequence[str], seed: int) -> list[Run]:
    """Ours first, for its start; then the peers; then ours from other seeds."""
    first = Run(name="qlora_kit", impl="qlora_kit", seed=seed, order=seed, starts_from=None)
    peers = [
        Run(name=impl, impl=impl, seed=seed, order=seed, starts_from="qlora_kit")
        for impl in impls
        if impl != "qlora_kit"
    ]
    other = replace(first, name="another start", seed=seed + 1)
    return [first, *peers, other, replace(other, name="another seed", order=seed + 1)]


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


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two loss curves, in nats."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def row_of(run: Run, result: dict[str, Any], reference: Sequence[float] | None) -> dict[str, Any]:
    """One row of the record.

    Args:
        run: what was run.
        result: what its process wrote, or why there is nothing.
        reference: PEFT's losses.

    Returns:
        The row; differences are None for the reference itself.
    """
    row: dict[str, Any] = {**asdict(run), **result}
    losses = result.get("losses")
    if losses is None:
        return row
    row["last_20_mean_loss"] = sum(losses[-20:]) / len(losses[-20:])
    if reference is not None and run.name != REFERENCE:
        row["mean_abs_difference"] = mean_difference(losses, reference)
        row["max_abs_difference"] = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
    return row


def verdict(rows: Sequence[dict[str, Any]]) -> tuple[bool, list[str]]:
    """Whether every library agrees and other seeds do not, and a line for each.

    Args:
        rows: of the record.

    Returns:
        Agreement, and what to print.
    """
    lines, good = [], True
    for row in rows:
        if "losses" not in row:
            lines.append(f"  {row['name']:14} {row.get('skipped') or row.get('error')}")
            good = good and "skipped" in row
            continue
        said = f"  {row['name']:14} last 20 steps {row['last_20_mean_loss']:.4f}"
        difference = row.get("mean_abs_difference")
        if difference is not None:
            same = row["starts_from"] is not None or row["name"] == "qlora_kit"
            met = difference <= TOLERANCE if same else difference > TOLERANCE
            row["agrees"] = difference <= TOLERANCE
            good = good and met
            said += f"  mean difference from PEFT {difference:.5f}, at most "
            said += f"{row['max_abs_difference']:.5f}: "
            said += ("the same" if difference <= TOLERANCE else "different") + (
                "" if met else "  MISSED"
            )
        lines.append(said)
    return good, lines


def train(run: Run, build: Build, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in a fresh process.

    Args:
        run: what to run.
        build: of this library.
        scratch: holds the batches; gets the start and the losses.
        arguments: policy and time limit.

    Returns:
        `losses`, `seconds` and `step`; or `skipped`; or `error`.
    """
    stem = run.name.replace(" ", "-")
    out = scratch / f"{stem}.json"
    work = {
        "build": asdict(build),
        "policy": arguments.policy,
        "batches": str(scratch / f"batches-{run.order}.safetensors"),
        "out": str(out),
        "save_start": str(scratch / f"start-{stem}") if run.impl == "qlora_kit" else None,
    }
    file = scratch / f"{stem}-job.json"
    file.write_text(json.dumps(work), encoding="utf-8")
    module = importlib.import_module(BUILDERS[run.impl])
    print(run.name, flush=True)
    outcome = run_process(
        command("benchmarks.train.quality_child", build, file),
        limit_seconds=arguments.limit_seconds,
        environment=module.environment(build),
        folder=scratch,
    )
    if not out.exists():
        print("   failed:", *outcome.tail[-15:], sep="\n     ", flush=True)
        return {"error": outcome.reason or "ended without a result"}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


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
    add("--limit-seconds", type=float, default=3600, help="for one training")
    add("--out", type=Path, help="instead of benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train everything, compare, record; 1 if a loss is off or two seeds agree."""
    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory(prefix="qlora-kit-quality-") as name:
        scratch = Path(name)
        if arguments.model == "tiny":
            folder = scratch / "tiny"
            write_checkpoint("tiny", folder, storage="bf16", device="cpu", dtype=dtype)
        else:
            folder = open_source(arguments.model).folder
        for order in (arguments.seed, arguments.seed + 1):
            file = scratch / f"batches-{order}.safetensors"
            tokens = write_batches(arguments.data, folder, file, seed=order, arguments=arguments)
        results: dict[str, dict[str, Any]] = {}
        planned = runs(arguments.impls, arguments.seed)
        for run in planned:
            start = run.starts_from and scratch / f"start-{run.starts_from}"
            build = Build(
                impl=run.impl,
                variant="compile" if run.impl == "unsloth" else "",
                model=Path(arguments.model).name,
                checkpoint=str(folder),
                rank=arguments.rank,
                checkpointing=False,
                longest=arguments.length,
                optimizer=arguments.optimizer,
                learning_rate=arguments.learning_rate,
                adapter=str(start) if start else None,
                masters="float32",
                step=arguments.step,
                seed=run.seed,
                device=device,
                dtype=arguments.dtype,
            )
            results[run.name] = train(run, build, scratch, arguments)
    reference = results.get(REFERENCE, {}).get("losses")
    rows = [row_of(run, results[run.name], reference) for run in planned]
    good, lines = verdict(rows)
    shared = {
        key: getattr(arguments, key)
        for key in ("steps", "batch", "length", "rank", "learning_rate", "optimizer", "dtype")
    }
    shared |= {"model": Path(arguments.model).name, "data": arguments.data.name}
    shared |= {"predicted_tokens": tokens, "policy": arguments.policy, "tolerance": TOLERANCE}
    print("\n".join(lines), flush=True)
    print(write_record("train_quality", [shared | row for row in rows], folder=arguments.out))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
