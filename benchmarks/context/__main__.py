"""How long a row may be: whole updates at batch 1 under a cap, one process per length.

    python -m benchmarks.context --model Llama-3.1-8B --lengths 200000 300000
    python -m benchmarks.context --model Llama-3.3-70B --lengths 36000 48000 \\
        --quantize-head --embeddings-on-host --optimizer paged_adamw_8bit
    python -m benchmarks.context --model Llama-3.1-8B --lengths 300000 --layers 2

Random NF4 weights made on the GPU; LoRA on all seven linears, forward, backward, clipping and
8-bit AdamW, nothing left out. Layers keep their inputs in pinned host memory (`--policy`) and
work on tiles (`--tile`). With `--layers` the peak is the same but for weights, adapters and
gradients, in a fraction of the time. Lengths that run out of memory are rows that say so.

Without a GPU a tiny model runs, which tests the benchmark and nothing else.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.context.child import Case, model_config
from benchmarks.harness.record import ROOT, write_record
from qlora_kit.bench.process import run_process
from qlora_kit.block.tiles import Tile
from qlora_kit.core.allocator import FIXED, growing_segments, segments_grow
from qlora_kit.core.units import GIB
from qlora_kit.plan.gpus import Gpu, this_gpu
from qlora_kit.plan.predict import predict
from qlora_kit.plan.setup import Setup
from qlora_kit.quant.config import QuantConfig


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="Llama-3.1-8B" if torch.cuda.is_available() else "tiny")
    add("--lengths", type=int, nargs="+", default=[300_000] if torch.cuda.is_available() else [96])
    add("--rank", type=int, default=32)
    add("--layers", type=int, help="instead of the model's own")
    add("--policy", default="offload")
    add("--tile", default="auto", help="auto, a number of tokens, or off")
    add("--optimizer", default="adamw_8bit", choices=["adamw_8bit", "paged_adamw_8bit"])
    add("--quantize-head", action="store_true")
    add("--embeddings-on-host", action="store_true")
    add("--cap-gib", type=float, default=44.0, help="GPU memory for torch; 0: all of it")
    add("--steps", type=int, default=1, help="long updates; the last one is timed")
    add("--fixed-segments", action="store_true", help="leave torch's allocator as it is")
    add("--limit-seconds", type=float, default=590, help="for one length")
    add("--out", type=Path, help="instead of benchmarks/results")
    return parser.parse_args(argv)


def case_of(arguments: argparse.Namespace, length: int) -> Case:
    """One length of what was asked for."""
    words: dict[str, Tile] = {"auto": "auto", "off": None}
    tile = words[arguments.tile] if arguments.tile in words else int(arguments.tile)
    return Case(
        model=arguments.model,
        length=length,
        rank=arguments.rank,
        layers=arguments.layers,
        policy=arguments.policy,
        tile=tile,
        optimizer=arguments.optimizer,
        quantize_head=arguments.quantize_head,
        embeddings_on_host=arguments.embeddings_on_host,
        cap_gib=arguments.cap_gib or None,
        steps=arguments.steps,
    )


def measure(case: Case, scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """One length in a process of its own; the row says so if it failed."""
    job, row = scratch / "job.json", scratch / "row.json"
    row.unlink(missing_ok=True)
    job.write_text(json.dumps({"case": asdict(case), "row_file": str(row)}), encoding="utf-8")
    print(f"{case.model}, {case.length:,} tokens", flush=True)
    environment = FIXED if arguments.fixed_segments else growing_segments()
    outcome = run_process(
        [sys.executable, "-m", "benchmarks.context.child", str(job)],
        limit_seconds=arguments.limit_seconds,
        folder=ROOT,
        environment=environment,
    )
    if row.exists():
        found: dict[str, object] = json.loads(row.read_text(encoding="utf-8"))
    else:
        print("   failed:", outcome.reason, *outcome.tail[-15:], sep="\n     ", flush=True)
        found = {**asdict(case), "trained": False, "error": outcome.reason or "no row"}
    return {**found, "expandable_segments": segments_grow({**os.environ, **environment})}


def predicted(case: Case, gpu: Gpu | None) -> dict[str, object]:
    """What the planner says of a length: peak, seconds of an update, and what the first one
    takes besides.

    Args:
        case: what is trained.
        gpu: the card; None where there is none.

    Returns:
        Fields of a row; empty without a GPU.
    """
    if gpu is None:
        return {}
    quant = QuantConfig()
    setup = Setup(
        rank=case.rank,
        seq=case.length,
        activations=case.policy,
        tile=case.tile,
        optimizer=case.optimizer,
        quant=quant.with_head() if case.quantize_head else quant,
        embeddings_on_host=case.embeddings_on_host,
    )
    made = predict(model_config(case), setup, gpu)
    return {
        "predicted_gib": made.peak_bytes / GIB,
        "predicted_seconds": made.step_s,
        "predicted_pinning_seconds": made.pinning_s,
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """One line per length."""
    names = ["first_seconds", "seconds", "predicted_seconds", "predicted_pinning_seconds"]
    names += ["tokens_per_s", "peak_allocated_gib", "predicted_gib", "peak_reserved_gib"]
    names += ["pinned_gib", "host_gib"]
    heads = ["first s", "s", "said", "pinning", "tokens/s", "peak", "said", "reserved"]
    heads += ["pinned", "host"]
    lines = [f"{'tokens':>9} " + " ".join(f"{head:>8}" for head in heads) + "  (GiB)"]
    for row in rows:
        cells = [f"{row[n]:.2f}" if isinstance(row.get(n), float) else "-" for n in names]
        end = "" if row["trained"] else f"  {row.get('error') or 'out of memory'}"
        lines.append(f"{row['length']:>9,} " + " ".join(f"{cell:>8}" for cell in cells) + end)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; 1 if a length failed otherwise than by running out of memory."""
    arguments = parse(argv)
    if not torch.cuda.is_available() and arguments.model != "tiny":
        sys.exit("there is no GPU here: only --model tiny makes sense without one")
    with tempfile.TemporaryDirectory(prefix="qlora-kit-context-") as scratch:
        cases = [case_of(arguments, length) for length in sorted(arguments.lengths)]
        rows = [measure(case, Path(scratch), arguments) for case in cases]
    longest = max(
        (case.length for case, r in zip(cases, rows, strict=True) if r["trained"]), default=0
    )
    gpu = this_gpu()
    for case, row in zip(cases, rows, strict=True):
        row |= predicted(case, gpu) | {"longest_trained": longest}
    print("\n" + table(rows), flush=True)
    print(write_record("context", rows, folder=arguments.out))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
