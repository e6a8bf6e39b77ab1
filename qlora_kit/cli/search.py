"""`qlora-kit search`: the best GLoRA structures in a trained super-net, as an adapter.

Candidates are compared on held-out rows of the run, never on those it was trained on. The best
of a thousand has been lucky as well as good, so the rows are divided: the search sees one part,
and the table shows losses on the other part too, beside random structures of the same size.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.arguments import Parser
from qlora_kit.cli.logs import setup_logging
from qlora_kit.cli.target import Target, add_loading_arguments, resolve_target, run_settings
from qlora_kit.core.atomic import atomic_directory, atomic_write_text
from qlora_kit.core.errors import ConfigError

if TYPE_CHECKING:
    from qlora_kit.adapters.glora.config import GLoRA
    from qlora_kit.adapters.super_net.search import SearchResult, SearchSettings
    from qlora_kit.cli.search_work import Work
    from qlora_kit.train.config import RunConfig

_ABOUT = """\
Search a trained GLoRA super-net (method: glora, glora.super_net: true) for the
structures with the lowest loss under a limit of trained values, and write them
as an adapter with the super-net's values, as the authors do: nothing is trained
after it. Looks at held-out rows of the run: a part is searched on, the others
judge."""
_EXAMPLES = """\
examples:
  qlora-kit search runs/super runs/found --params 2M
  qlora-kit search runs/super runs/found --params 200K --generations 10
  qlora-kit merge runs/found merged/
  qlora-kit train runs/found/config.json    # its structures, from the start

OUT holds adapter/, which merge, chat and eval accept, config.json (a run with
these structures) and search.json (table, history, the best candidates)."""
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmb]?)")


def _parser() -> Parser:
    parser = Parser("search", "RUN OUT --params COUNT [options]", _ABOUT, _EXAMPLES)
    parser.add_argument("run", help="the folder of a run that trained a super-net")
    parser.add_argument("out", help="folder to create")
    parser.add_argument(
        "--params",
        required=True,
        metavar="COUNT",
        help="most trained values, as in 200K or 2M; a classifier's head is not counted",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    sizes = parser.add_argument_group("search (the defaults are the authors')")
    sizes.add_argument("--generations", type=int, default=20, help="populations (default 20)")
    sizes.add_argument("--population", type=int, default=50, help="candidates in each (default 50)")
    sizes.add_argument("--top", type=int, default=10, help="best so far as parents (default 10)")
    sizes.add_argument("--mutations", type=int, help="of one parent (default: half a population)")
    sizes.add_argument("--crossovers", type=int, help="of two parents (default: half)")
    sizes.add_argument(
        "--probability",
        type=float,
        default=0.2,
        help="that a mutation draws a support anew (default 0.2)",
    )
    sizes.add_argument("--seed", type=int, help="of all draws (default: the run's)")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--set", help="held-out set of the run, if it has several")
    rows.add_argument("--rows", type=int, help="to search on (default: half of the held-out ones)")
    rows.add_argument("--batch-size", type=int, help="rows at a time")
    rows.add_argument(
        "--controls", type=int, default=5, help="random structures of its size (default 5)"
    )
    add_loading_arguments(parser)
    return parser


def parse_count(text: str) -> int:
    """Read a number of values.

    Args:
        text: a number, with K, M or B for thousands, millions or billions.

    Returns:
        The number, rounded down.

    Raises:
        ConfigError: it is none.

    Example:
        >>> parse_count("1.5M"), parse_count("20_000")
        (1500000, 20000)
    """
    match = _COUNT.fullmatch(text.strip().lower().replace(",", "").replace("_", ""))
    if match is None:
        raise ConfigError(f"--params takes a number such as 200K or 2M, got {text!r}.")
    return int(float(match[1]) * _FACTORS[match[2]])


def run(argv: Sequence[str]) -> int:
    """Search; see `qlora-kit search --help`.

    Args:
        argv: the words after `qlora-kit search`.

    Returns:
        0.

    Raises:
        ConfigError: there is no super-net or no held-out row, a size is out of range, OUT exists,
            or nothing was found.
    """
    options = _parser().parse_args(argv)
    limit = parse_count(options.params)
    setup_logging()
    out = Path(options.out)
    _check_folder(out, options)
    target, run_config, config = _super_net(options)
    settings = _settings(options, run_config)
    from qlora_kit.cli.search_work import Work, print_tables

    start = time.perf_counter()
    work = Work(options, run_config, target, settings)
    _check_limit(limit, work)
    found = work.search(limit)
    if all(set(str(structure).split()) == {"none"} for structure in found.best.structures):
        raise ConfigError(
            f"with at most {limit:,} values no structure was better than the base alone. Raise "
            "--params, search on more rows, or train the super-net for longer."
        )
    record = work.record(found, limit) | {"seconds": round(time.perf_counter() - start, 3)}
    print_tables(record)
    _write(out, record, work, replace(run_config, glora=found.config(config)), found)
    print(f"\nadapter: {out / 'adapter'}\nhistory: {out / 'search.json'}")
    return 0


def _check_folder(out: Path, options: argparse.Namespace) -> None:
    """Refuse a folder that holds something, the super-net above all."""
    if Path(options.run).resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{out} holds the super-net itself. Choose another folder.")
    if out.exists() and not options.overwrite and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out} exists. Choose another folder, or replace it with --overwrite.")


def _super_net(options: argparse.Namespace) -> "tuple[Target, RunConfig, GLoRA]":
    """What RUN is, refused unless a run trained a super-net there."""
    target = resolve_target(options.run, options)
    run_config = run_settings(options.run)
    if target.adapter is None or run_config is None:
        raise ConfigError(
            f"{options.run} is not the folder of a finished run: a search needs its adapter and "
            "its config.json, which says what was held out."
        )
    from qlora_kit.adapters.formats.peft import read_adapter
    from qlora_kit.adapters.glora.config import GLoRA

    config = read_adapter(target.adapter).config
    if not isinstance(config, GLoRA):
        raise ConfigError(
            f"{options.run} was trained with method: {run_config.method}. A search goes through a "
            "GLoRA super-net: train one with method: glora and glora.super_net: true."
        )
    if not config.super_net:
        raise ConfigError(
            f"{options.run} has one structure for every linear, so there is nothing to search. "
            "Train a super-net: glora.super_net: true."
        )
    return target, run_config, config


def _settings(options: argparse.Namespace, run_config: "RunConfig") -> "SearchSettings":
    from qlora_kit.adapters.super_net.search import SearchSettings

    for name in ("controls", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    half = options.population // 2
    mutations = half if options.mutations is None else options.mutations
    crossovers = min(half, options.population - mutations)
    return SearchSettings(
        population=options.population,
        top=options.top,
        mutations=mutations,
        crossovers=crossovers if options.crossovers is None else options.crossovers,
        probability=options.probability,
        generations=options.generations,
        seed=run_config.train.seed if options.seed is None else options.seed,
    )


def _check_limit(limit: int, work: "Work") -> None:
    """Refuse a limit that leaves some linears without a value whatever is found."""
    least = len(work.pieces)
    if limit < least:
        raise ConfigError(
            f"--params {limit:,} is too small: one value for each of the {least} linears makes "
            f"{least:,}, and the super-net has {work.largest:,}."
        )
    if limit >= work.largest:
        print(f"note: the whole super-net has {work.largest:,} values; this limit bounds nothing.")


def _write(
    out: Path, record: dict[str, Any], work: "Work", found_run: "RunConfig", found: "SearchResult"
) -> None:
    """The folder, whole or not at all."""
    from qlora_kit.train.glora import cut_out

    small = cut_out(work.model, work.adapter, found)
    # training starts in a folder of its own: a run clears what it is given
    fields = asdict(found_run) | {"output": f"{out}-trained", "overwrite": False, "resume": False}
    with atomic_directory(out, overwrite=work.options.overwrite) as folder:
        small.save(folder / "adapter", base_model=work.target.base, revision=work.target.revision)
        atomic_write_text(folder / "config.json", json.dumps(fields, indent=1) + "\n")
        atomic_write_text(folder / "search.json", json.dumps(record, indent=1) + "\n")
