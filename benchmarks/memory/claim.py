"""The 3x claim: full fine-tuning against LoRA and QLoRA, memory and speed, in one record.

    python -m benchmarks.memory.claim                                # 1B and 3B: fits 80 GB
    python -m benchmarks.memory.claim --models Llama-3.1-8B          # full needs a 141 GB card

The measuring is `qlora-kit bench memory`'s; this chooses what belongs into the table so that it
takes about five minutes: one process per model and method (building it is most of the time),
the caches emptied and the counters set to zero before each point. Without a GPU: a tiny model.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.record import write_record
from qlora_kit.bench.grid import Options
from qlora_kit.bench.markdown import render_markdown
from qlora_kit.bench.run import Limits, for_this_machine, run_bench

MODELS = ("Llama-3.2-1B", "Llama-3.2-3B")


def rounds(models: Sequence[str], seq: int) -> list[Options]:
    """What is measured, the most important first.

    Args:
        models: names of shapes.
        seq: tokens per row.

    Returns:
        Sets of options for one run.
    """
    main = Options(
        models=tuple(models),
        methods=("full", "qlora", "lora"),
        batches=(1, 4),
        seqs=(seq,),
        graphs="both",
        fresh=False,
    )
    alone = replace(main, batches=(1,), graphs="off")
    return [
        main,
        replace(main, methods=("qlora",), batches=(1,), policies=("recompute_elementwise",)),
        replace(alone, methods=("qlora",), policies=("offload",)),
        replace(alone, methods=("qlora_fa", "lora_fa")),
        replace(alone, methods=("qlora_paged",), policies=("recompute_all",)),
        replace(alone, methods=("full_bf16",)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record and its reports, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--total-seconds", type=float, default=400)
    parser.add_argument("--limit-seconds", type=float, default=150, help="for one process")
    parser.add_argument("--reports", type=Path, help="keep rows, Markdown and HTML in this folder")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.reports or Path(scratch)
        record = run_bench(
            "memory",
            [for_this_machine(options) for options in rounds(arguments.models, arguments.seq)],
            folder,
            command=shlex.join(["python", "-m", "benchmarks.memory.claim", *sys.argv[1:]]),
            limits=Limits(process=arguments.limit_seconds, total=arguments.total_seconds),
        )
    print("\n" + render_markdown(record))
    print(write_record("memory", record["rows"], peaks=record["peaks"], folder=arguments.out))
    return 1 if any(row.get("error") for row in record["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
