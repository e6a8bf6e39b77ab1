"""`qlora-kit eval`: measure a model or an adapter on any data file."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qlora_kit.cli.arguments import Parser
from qlora_kit.cli.logs import setup_logging
from qlora_kit.cli.target import (
    add_loading_arguments,
    class_names,
    load_target,
    resolve_target,
    run_settings,
)
from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.errors import ConfigError
from qlora_kit.train.config import DataConfig, DataFormat, EvalConfig, EvalTask, RunConfig

if TYPE_CHECKING:
    from qlora_kit.train.evaluate import SetResult

_ABOUT = """\
Measure a model, an adapter or a run on held-out rows: loss and perplexity, and
accuracy of a choice, exact match of generated answers, or classification.
What is not given is as in the run that the target came from."""
_EXAMPLES = """\
examples:
  qlora-kit eval runs/quickstart
  qlora-kit eval runs/quickstart/adapter demo/rotten_tomatoes/test.jsonl --base
  qlora-kit eval runs/quickstart/merged test.jsonl --limit 100
  qlora-kit eval some/hub-id texts.jsonl --task perplexity"""


def _parser() -> Parser:
    parser = Parser("eval", "TARGET [DATA] [options]", _ABOUT, _EXAMPLES)
    parser.add_argument("target", help="a model, an adapter folder, or the folder of a run")
    parser.add_argument(
        "data",
        nargs="?",
        help=".jsonl, .json, .csv or .parquet file, a datasets folder, or a hub id (default: the "
        "held-out rows of the run)",
    )
    parser.add_argument("--data", dest="data_flag", metavar="DATA", help="the same as a flag")
    parser.add_argument("--base", action="store_true", help="measure the base as well")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    measure = parser.add_argument_group("measuring")
    measure.add_argument(
        "--task",
        choices=get_args(EvalTask),
        metavar="TASK",
        help=f"{', '.join(get_args(EvalTask))} (auto: what fits the answers)",
    )
    measure.add_argument("--choices", metavar="A,B", help="the labels of a choice")
    measure.add_argument("--labels", metavar="A,B", help="class names of a classifier, by id")
    measure.add_argument("--batch-size", type=int, help="rows at a time")
    measure.add_argument("--max-new-tokens", type=int, help="longest answer")
    measure.add_argument("--samples", type=int, default=3, help="answers to show (default 3)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--format",
        choices=get_args(DataFormat),
        metavar="NAME",
        help=f"{', '.join(get_args(DataFormat))} (auto: by the columns)",
    )
    data.add_argument("--split", help="of a data set that has several")
    data.add_argument("--limit", type=int, help="use only the first rows")
    data.add_argument("--max-length", type=int, help="longest example in tokens")
    data.add_argument("--system-prompt", metavar="TEXT", help="for rows without a system message")
    add_loading_arguments(parser)
    return parser


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",")) if text else ()


def run(argv: Sequence[str]) -> int:
    """Measure; see `qlora-kit eval --help`.

    Args:
        argv: the words after `qlora-kit eval`.

    Returns:
        0.

    Raises:
        ConfigError: the base was asked for and there is no adapter.
    """
    options = _parser().parse_args(argv)
    options.data = options.data_flag or options.data
    setup_logging()
    target = resolve_target(options.target, options)
    if options.base and target.adapter is None:
        raise ConfigError(f"--base goes with an adapter, and {options.target} is a model itself.")
    results = _measure(options, target)
    for name, result in results.items():
        _print(name, result)
    if options.json:
        content = {
            "target": options.target,
            "data": options.data,
            "results": {name: asdict(result) for name, result in results.items()},
        }
        atomic_write_text(Path(options.json), json.dumps(content, indent=1) + "\n")
        print(f"results: {options.json}")
    return 0


def _settings(options: argparse.Namespace, run: RunConfig | None) -> tuple[DataConfig, EvalConfig]:
    """The flags, over the settings of the run that the target came from, over the defaults."""
    data = run.data if run else DataConfig(train=options.data)
    measure = run.eval if run else EvalConfig()
    source = {}
    if options.data:
        source = {"train": options.data, "eval": options.data, "limit_eval": options.limit}
    elif options.limit:
        source = {"limit_eval": options.limit}
    data_flags = {
        "eval_split": options.split,
        "format": options.format,
        "system_prompt": options.system_prompt,
        "max_length": options.max_length,
    }
    measure_flags = {
        "task": options.task,
        "choices": _words(options.choices) or None,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
    }
    return (
        replace(
            data,
            **source,
            **{name: value for name, value in data_flags.items() if value is not None},
        ),
        replace(
            measure,
            samples=options.samples,
            **{name: value for name, value in measure_flags.items() if value is not None},
        ),
    )


def _measure(options: argparse.Namespace, target: Any) -> "dict[str, SetResult]":
    from rich.console import Console

    from qlora_kit.train.callbacks import Phases
    from qlora_kit.train.data.dataset import build_dataset
    from qlora_kit.train.evaluate import Evaluator

    run = run_settings(options.target)
    if run is None and options.data is None:
        raise ConfigError(f"{options.target} belongs to no run, so name the data to measure it on.")
    model, tokenizer, adapter = load_target(target, options)
    labels = _words(options.labels) or (run.model.labels if run else ()) or class_names(model)
    data_config, settings = _settings(options, run)
    seed = run.train.seed if run else 0  # which rows `eval_fraction` holds out
    data = build_dataset(data_config, tokenizer, "eval", task=target.task, labels=labels, seed=seed)
    evaluator = Evaluator(tokenizer, settings, phases=Phases(Console(file=sys.stderr)))
    results = {}
    if options.base and adapter is not None:
        with adapter.disabled():
            results["base"] = evaluator.measure(model, data, "base")
    name = "model" if adapter is None else "adapter"
    results[name] = evaluator.measure(model, data, name)
    return results


def _print(name: str, result: "SetResult") -> None:
    numbers = [f"loss {result.loss:.4f}"]
    if result.perplexity is not None:
        numbers.append(f"perplexity {result.perplexity:.2f}")
    numbers += [f"{score} {value:.1%}" for score, value in result.scores.items()]
    print(f"{name}: {', '.join(numbers)}")
    print(f"  {result.task} on {result.rows:,} rows, {result.tokens:,} tokens counted, ", end="")
    print(f"{result.seconds:.1f} s")
    for answer in result.answers:
        mark = {True: "right", False: "wrong", None: "     "}[answer.right]
        print(f"  {mark}  {' '.join(answer.prompt.split())[-60:]!r}")
        print(f"         expected {answer.reference!r}, answered {answer.answer!r}")
