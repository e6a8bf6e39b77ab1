"""`qlora-kit bench`: memory and speed of fine-tuning on this machine, method by method."""

import json
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.bench.methods import METHODS, PEERS
from qlora_kit.cli.arguments import Parser, nearest
from qlora_kit.core.errors import ConfigError, SourceError

BENCHES = {
    "memory": "peak memory by component, beside full fine-tuning's",
    "speed": "tokens/s of a training step, beside full fine-tuning's",
    "latency": "inference with LoRA, merged LoRA and bottleneck adapters",
    "sizes": "checkpoints, and QLoRA's published memory, by arithmetic alone",
}
"""What can be measured."""

_HELP = """\
usage: qlora-kit bench WHAT [OPTIONS]
       qlora-kit bench WHAT --help

Measure on this machine, with random weights of real shapes: nothing is
downloaded. Memory and speed: every measurement in a process of its own,
out of memory is a result; rows.jsonl as rows come, then record.json,
report.md and report.html.

what:
{benches}

Without a GPU a tiny model runs on the CPU: a test of the commands only.
"""

_EXAMPLES = """\
examples:
  qlora-kit bench {what}
  qlora-kit bench {what} --models Llama-3.1-8B --methods qlora --seqs 2048 8192
  qlora-kit bench {what} --methods full qlora --peers
  qlora-kit bench {what} --compare bench-old/record.json
  qlora-kit bench {what} --from bench-old/record.json   # reports again, only
"""
_DESCRIPTION = """\
Train a few steps of every method x model x batch x sequence x policy and
record {records}.

Full fine-tuning is measured with gradient checkpointing and without, with
the model's own loss and with the chunked one; ratios are against the better.
With --compare the exit code is 1 if anything became worse."""
_RECORDS = {
    "memory": "peak memory by component, with the prediction beside it",
    "speed": "tokens per second, with memory beside it",
}


def _parser(what: str) -> Parser:
    parser = Parser(
        f"bench {what}",
        "[OPTIONS]",
        _DESCRIPTION.format(records=_RECORDS[what]),
        _EXAMPLES.format(what=what),
    )
    measured = parser.add_argument_group("what is measured")
    add = measured.add_argument
    add("--models", nargs="+", default=["Llama-3.2-1B"], help="names, config folders, hub ids")
    add("--methods", nargs="+", default=None, help=f"of {', '.join(METHODS)} (default: all)")
    add("--peers", action="store_true", help=f"also {', '.join(PEERS)}, where installed")
    add("--batches", nargs="+", type=int, default=[1], help="rows per step")
    add("--seqs", nargs="+", type=int, default=[2048], help="tokens per row")
    add("--policies", nargs="+", default=["recompute_all", "save"], help="what is kept, ours")
    add("--optimizer", help="of adapters, a Transformers name")
    add("--rank", type=int, default=16)
    add("--graphs", default="off" if what == "memory" else "on", help="off, on or both")
    add("--cap-gib", type=float, help="GPU memory torch may take")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--warmup", type=int, default=3, help="steps before the timed ones (default 3)")
    steps = 3 if what == "memory" else 6
    add("--steps", type=int, default=steps, help=f"timed steps (default {steps})")
    add("--share", action="store_true", help="one process per model and method, not per point")
    add("--limit-seconds", type=float, default=300, help="of one process (default 300)")
    add("--total-seconds", type=float, default=3600, help="of the run (default 3600)")
    add("--work", type=Path, help="keep the checkpoints that peers read here")
    _add_results(parser)
    return parser


def _add_results(parser: Parser) -> None:
    results = parser.add_argument_group("results")
    add = results.add_argument
    add("--out", type=Path, help="folder of the results (default bench-WHAT-TIME)")
    add("--from", dest="record", type=Path, metavar="JSON", help="measure nothing, read this")
    add("--compare", type=Path, metavar="JSON", help="exit with 1 if worse than this record")
    add("--memory-threshold", type=float, default=2.0, help="percent more is worse (default 2)")
    add("--speed-threshold", type=float, default=5.0, help="percent less is worse (default 5)")


def run(argv: Sequence[str]) -> int:
    """Measure; see `qlora-kit bench --help`.

    Args:
        argv: the words after `qlora-kit bench`.

    Returns:
        0, or 1 where a comparison found something worse or a process failed.

    Raises:
        ConfigError: there is no such benchmark.
    """
    if not argv or argv[0] in ("-h", "--help"):
        benches = "\n".join(f"  {name:<8} {text}" for name, text in BENCHES.items())
        print(_HELP.format(benches=benches), end="")
        return 0 if argv else 2
    what, *rest = argv
    if what not in BENCHES:
        raise ConfigError(
            f"there is no benchmark {what!r}.{nearest(what, list(BENCHES))} "
            f"Known: {', '.join(BENCHES)}."
        )
    return _RUNNERS[what](what, rest)


def _run_training(what: str, words: Sequence[str]) -> int:
    options = _parser(what).parse_args(words)
    old = None if options.compare is None else read_record(options.compare, what)
    folder = options.out or Path(time.strftime(f"bench-{what}-%Y%m%d-%H%M%S"))
    if options.record is None:
        record = _measure(what, options, folder, shlex.join(["qlora-kit", "bench", what, *words]))
    else:
        record = _again(read_record(options.record, what), folder)
    _print(record, folder)
    failed = any(row.get("error") for row in record["rows"])
    return 1 if failed or (old is not None and _worse(old, record, options)) else 0


def _measure(what: str, options: Namespace, folder: Path, command: str) -> dict[str, Any]:
    from qlora_kit.bench.grid import Options
    from qlora_kit.bench.run import Limits, for_this_machine, run_bench
    from qlora_kit.bench.shapes import config_of

    methods = tuple(options.methods or METHODS)
    wanted = Options(
        models=tuple(options.models),
        methods=methods + (tuple(PEERS) if options.peers else ()),
        batches=tuple(options.batches),
        seqs=tuple(options.seqs),
        policies=tuple(options.policies),
        graphs=options.graphs,
        rank=options.rank,
        optimizer=options.optimizer,
        cap_gib=options.cap_gib,
        warmup=options.warmup,
        steps=options.steps,
        fresh=not options.share,
    )
    for model in wanted.models:
        config_of(model)  # a wrong name is said now, not by every process
    used = for_this_machine(wanted)
    if used.models != wanted.models:
        names = ", ".join(wanted.models)
        print(f"There is no GPU here: a tiny model of 2 x 64 tokens runs instead of {names}.")
    return run_bench(
        what,
        [used],
        folder,
        command=command,
        limits=Limits(process=options.limit_seconds, total=options.total_seconds),
        work=options.work,
    )


def _again(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Predictions and reports of a record that was measured before."""
    from qlora_kit.bench.predicted import add_predictions
    from qlora_kit.bench.run import write_reports

    folder.mkdir(parents=True, exist_ok=True)
    add_predictions(record)
    write_reports(record, folder)
    return record


def _print(record: dict[str, Any], folder: Path) -> None:
    from qlora_kit.bench.markdown import render_markdown

    print(f"\n{render_markdown(record)}\n{folder / 'report.html'}", flush=True)


def _worse(old: dict[str, Any], record: dict[str, Any], options: Namespace) -> bool:
    from qlora_kit.bench.compare import compare, report

    memory, speed = options.memory_threshold, options.speed_threshold
    changes = compare(old, record, memory=memory / 100, speed=speed / 100)
    if not changes:
        raise ConfigError(
            f"{options.compare} has no measurement in common with this run: give the same "
            "--models, --batches, --seqs and --policies."
        )
    limits = f"more than {memory:g}% more memory, or {speed:g}% slower"
    print(report(old, record, changes, limits=limits))
    return any(change.worse for change in changes)


def read_record(file: Path, what: str) -> dict[str, Any]:
    """Read a record that a benchmark wrote.

    Args:
        file: its `record.json`.
        what: the benchmark it should be of; a name of `BENCHES`.

    Returns:
        The record.

    Raises:
        SourceError: the file cannot be read.
        ConfigError: it is no record, or of something else.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); a record.json was expected.") from error
    bench = record.get("bench") if isinstance(record, dict) else None
    if bench != what and {bench, what} != {"memory", "speed"}:
        raise ConfigError(f"{file} is a record of {bench!r}, not of `bench {what}`.")
    assert isinstance(record, dict)
    return record


def _latency_parser() -> Parser:
    parser = Parser(
        "bench latency",
        "[OPTIONS]",
        "Time one forward pass and a generation of the base model, with LoRA beside its\n"
        "linears, with LoRA merged, and with bottleneck adapters (Pfeiffer, Houlsby),\n"
        "as in table 1 of LoRA's paper. Random weights in 16 bits.",
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["GPT-2-medium", "Llama-3.2-1B"], help="names of shapes")
    add("--shapes", nargs="+", default=["32x512", "16x256", "1x128"], help="BATCHxSEQUENCE")
    add("--new-tokens", type=int, default=16, help="of a generation; 0: none (default 16)")
    add("--rank", type=int, default=16, help="of LoRA on all linears (default 16)")
    add("--reduction", type=int, default=16, help="model's width over a bottleneck's")
    add("--seconds", type=float, default=4.0, help="about, per line of the table (default 4)")
    add("--out", type=Path, help="folder of the results (default bench-latency-TIME)")
    return parser


def _shape(text: str) -> tuple[int, int]:
    batch, _, seq = text.partition("x")
    if not (batch.isdigit() and seq.isdigit()):
        raise ConfigError(f"a shape is BATCHxSEQUENCE, as in 16x256; got {text!r}.")
    return int(batch), int(seq)


def _run_latency(what: str, words: Sequence[str]) -> int:
    options = _latency_parser().parse_args(words)
    shapes = tuple(_shape(text) for text in options.shapes)
    import torch

    from qlora_kit.bench.latency import LatencyOptions, measure_latency, render_latency
    from qlora_kit.bench.run import TINY_NOTE, record_of

    gpu = torch.cuda.is_available()
    rows = []
    for model in options.models if gpu else ["tiny"]:
        wanted = LatencyOptions(
            model=model,
            shapes=shapes if gpu else ((1, 16), (2, 32)),
            new_tokens=options.new_tokens if gpu else min(options.new_tokens, 4),
            rank=options.rank,
            reduction=options.reduction,
            seconds=options.seconds if gpu else 0.5,
            device="cuda" if gpu else "cpu",
            dtype="bfloat16" if gpu else "float32",
        )
        rows += measure_latency(wanted)
    record = record_of(what, rows, shlex.join(["qlora-kit", "bench", what, *words]))
    text = ("" if gpu else f"**{TINY_NOTE}**\n\n") + render_latency(rows)
    _save(what, options.out, record, text)
    return 0


def _run_sizes(what: str, words: Sequence[str]) -> int:
    parser = Parser(
        "bench sizes",
        "[OPTIONS]",
        "Count, from configurations alone: checkpoints of models and adapters, and the\n"
        "memory breakdown that QLoRA's paper gives for LLaMA 7B to 65B.",
    )
    parser.add_argument("--out", type=Path, help="file for the tables, in Markdown")
    options = parser.parse_args(words)
    from qlora_kit.bench.sizes import render_sizes
    from qlora_kit.core.atomic import atomic_write_text

    text = render_sizes()
    print(text, end="")
    if options.out is not None:
        atomic_write_text(options.out, text)
    return 0


def _save(what: str, out: Path | None, record: dict[str, Any], text: str) -> None:
    """Write a record and its Markdown, and print where."""
    from qlora_kit.core.atomic import atomic_write_text

    folder = out or Path(time.strftime(f"bench-{what}-%Y%m%d-%H%M%S"))
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "record.json", json.dumps(record, indent=1) + "\n")
    atomic_write_text(folder / "report.md", text)
    print(f"\n{text}\n{folder / 'report.md'}", flush=True)


_RUNNERS: dict[str, Callable[[str, Sequence[str]], int]] = {
    "memory": _run_training,
    "speed": _run_training,
    "latency": _run_latency,
    "sizes": _run_sizes,
}
