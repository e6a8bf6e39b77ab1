"""The 3x claim: full fine-tuning against LoRA and QLoRA, memory and speed, in one record.

    python -m benchmarks.memory.claim                                # 1B and 3B: fits 80 GB
    python -m benchmarks.memory.claim --models Llama-3.1-8B          # full needs a 141 GB card

    python -m benchmarks.memory.claim --have RECORD --together       # only what is missing in it

The measuring is `qlora-kit bench memory`'s; this chooses what belongs into the table so that it
takes about five minutes: one process per model and method (building it is most of the time), or
per model (`--together`), the caches emptied and the counters set to zero before each point.
Batches that training records are measured with CUDA graphs and without, full fine-tuning too.
Without a GPU: a tiny model.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.record import write_record
from qlora_kit.bench.grid import Options
from qlora_kit.bench.markdown import render_markdown
from qlora_kit.bench.record import Row
from qlora_kit.bench.run import Limits, for_this_machine, run_bench

MODELS = ("Llama-3.2-1B", "Llama-3.2-3B")


def rounds(models: Sequence[str], seq: int, large: Sequence[str] | None = None) -> list[Options]:
    """What is measured, the most important first.

    Args:
        models: names of shapes.
        seq: tokens per row.
        large: models that are measured with batches of four rows too; None for all.

    Returns:
        Sets of options for one run.
    """
    main = Options(
        models=tuple(models),
        methods=("full", "qlora", "lora"),
        batches=(1,),
        seqs=(seq,),
        graphs="both",
        fresh=False,
    )
    alone = replace(main, graphs="off")
    four = tuple(model for model in models if large is None or model in large)
    return [
        main,
        *([replace(main, models=four, batches=(4,))] if four else []),
        replace(main, methods=("qlora",), policies=("recompute_elementwise",)),
        replace(alone, methods=("qlora",), policies=("offload",)),
        *(
            [replace(alone, models=four, batches=(4,), methods=("qlora",), policies=("offload",))]
            if four
            else []
        ),
        replace(alone, methods=("qlora_fa", "lora_fa")),
        replace(alone, methods=("qlora_paged",), policies=("recompute_all",)),
        replace(alone, methods=("full_bf16",)),
    ]


def known_rows(file: Path) -> list[Row]:
    """The rows of a record, each with its commit.

    Args:
        file: as this writes it.

    Returns:
        Rows.
    """
    record = json.loads(file.read_text(encoding="utf-8"))
    return [{"commit": record["commit"], **row} for row in record["rows"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record and its reports, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--total-seconds", type=float, default=400)
    parser.add_argument("--limit-seconds", type=float, default=150, help="for one process")
    parser.add_argument("--large", nargs="*", help="models with batches of 4 as well; default: all")
    parser.add_argument("--have", nargs="+", type=Path, default=[], help="records to complete")
    parser.add_argument("--together", action="store_true", help="one process per model")
    parser.add_argument("--reports", type=Path, help="keep rows, Markdown and HTML in this folder")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.reports or Path(scratch)
        record = run_bench(
            "memory",
            [
                for_this_machine(options)
                for options in rounds(arguments.models, arguments.seq, arguments.large)
            ],
            folder,
            command=shlex.join(["python", "-m", "benchmarks.memory.claim", *sys.argv[1:]]),
            limits=Limits(process=arguments.limit_seconds, total=arguments.total_seconds),
            earlier=[row for file in arguments.have for row in known_rows(file)],
            together=arguments.together,
        )
    print("\n" + render_markdown(record))
    print(write_record("memory", record["rows"], peaks=record["peaks"], folder=arguments.out))
    return 1 if any(row.get("error") for row in record["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
