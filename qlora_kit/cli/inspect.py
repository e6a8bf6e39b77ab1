"""`qlora-kit inspect`: what adapters learned, and sweeps over ranks and matrices."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.arguments import Parser
from qlora_kit.cli.logs import quiet_progress, setup_logging
from qlora_kit.cli.run_config import CommandLine, load_config, parse_words
from qlora_kit.cli.target import find_adapter, run_settings
from qlora_kit.core.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from qlora_kit.analysis.record import Options
    from qlora_kit.analysis.sweep import Cell, Group
    from qlora_kit.train.config import RunConfig

_ABOUT = """\
Look into adapters without loading a model: singular values of every change;
the amplification factor, as table 7 of LoRA's paper, where the base can be
read; and of two or more the similarity phi(i, j) of their subspaces, beside
that of random ones. Writes inspect.json, inspect.html and figures.

With --sweep: train a run several times over ranks (the paper's table 6) or
over matrices at one number of trained parameters (table 5)."""
_EXAMPLES = """\
examples:
  qlora-kit inspect runs/quickstart
  qlora-kit inspect runs/r8 runs/r64 --modules q_proj v_proj --out compared
  qlora-kit inspect runs/r8 --base some/hub-id --into original
  qlora-kit inspect --sweep ranks examples/quickstart.yaml --ranks 1,4,64
  qlora-kit inspect --sweep matrices examples/quickstart.yaml --seeds 0,1,2

With --sweep every flag of `qlora-kit train` is understood, and:
  --groups "q_proj q_proj,v_proj"   what is adapted together, a word a group
  --ranks 1,2,4,8,64                of --sweep ranks
  --budget 100000                   parameters, of --sweep matrices
  --seeds 0,1                       a run of each"""
SWEEPS = ("ranks", "matrices")
_SWEEP_FLAGS = ("sweep", "groups", "ranks", "budget", "seeds", "out")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _parser() -> Parser:
    parser = Parser("inspect", "ADAPTER... [options]", _ABOUT, _EXAMPLES)
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="adapter folders, or folders of runs")
    add(
        "--base",
        "--base-model",
        dest="base_model",
        metavar="PATH",
        help="the weights W, if the base has moved since training",
    )
    add("--no-base", action="store_true", help="leave out what needs the weights")
    add(
        "--into",
        choices=("quantized", "original"),
        default="quantized",
        help="W is quantized (default): as training decoded it; original: the 16-bit weight",
    )
    add("--modules", nargs="+", default=(), metavar="NAME", help="name endings, or re: patterns")
    add(
        "--sides",
        default="A,B",
        metavar="A,B",
        help="directions to compare: A, B (default), input, output of the change",
    )
    add("--device", default="auto", help="where to compute: auto, cpu, cuda, ...")
    add("--seed", type=int, default=0, help="of the random controls (default 0)")
    add("--out", type=Path, default=Path("inspect"), help="folder of the results")
    add("--sweep", choices=SWEEPS, metavar="WHAT", help="ranks or matrices; see below")
    return parser


def run(argv: Sequence[str]) -> int:
    """Inspect or sweep; see `qlora-kit inspect --help`.

    Args:
        argv: the words after `qlora-kit inspect`.

    Returns:
        0.

    Raises:
        ConfigError: flags contradict each other, or name nothing.
    """
    is_sweep = any(word == "--sweep" or word.startswith("--sweep=") for word in argv)
    if is_sweep and not {"-h", "--help"} & set(argv):
        return _sweep(parse_words(argv, "inspect", options=_SWEEP_FLAGS))
    options = _parser().parse_args(argv)
    setup_logging()
    from qlora_kit.analysis.record import inspect_adapters
    from qlora_kit.analysis.tables import tables_of

    folders = [_adapter_of(path) for path in options.adapters]
    record = inspect_adapters(folders, _options(options, folders))
    for table in tables_of(record):
        print(f"{table.text()}\n")
    for file in _write(record, options.out):
        print(file)
    return 0


def _adapter_of(path: str) -> Path:
    """The adapter's folder, or what was named, for reading it to say what is missing."""
    found = find_adapter(path)
    if found is None and (run := run_settings(path)) is not None and run.method == "full":
        raise ConfigError(
            f"{path} is a full fine-tuning, which saves a whole model: there is no adapter to "
            "inspect."
        )
    return found or Path(path)


def _options(options: argparse.Namespace, folders: Sequence[Path]) -> "Options":
    from qlora_kit.adapters.formats.peft import read_adapter
    from qlora_kit.analysis.directions import SIDES
    from qlora_kit.analysis.record import Options
    from qlora_kit.checkpoint.source import open_source
    from qlora_kit.export.merge import pick_device

    sides = tuple(side for side in SIDES if side in options.sides.split(","))
    if len(sides) != len(options.sides.split(",")):
        raise ConfigError(f"--sides takes {', '.join(SIDES)}, got {options.sides!r}.")
    if options.no_base and options.base_model:
        raise ConfigError("--no-base and --base contradict each other.")
    base, revision = options.base_model, None
    if base is None and not options.no_base:
        infos = {(f.base.path, f.base.revision) for f in map(read_adapter, folders)}
        if len(infos) > 1:
            raise ConfigError(
                f"the adapters name different bases ({', '.join(str(p) for p, _ in infos)}). Give "
                "one with --base, or compare without weights: --no-base."
            )
        base, revision = infos.pop()
        try:
            if base is not None:
                open_source(base, revision=revision)
        except SourceError as error:
            print(f"no amplification table: {error} Name the base with --base.\n")
            base = None
    return Options(
        base=base,
        revision=revision,
        into=options.into,
        modules=tuple(options.modules),
        sides=sides,
        device=str(pick_device(options.device)),
        seed=options.seed,
    )


def _write(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the record, the page and every figure of a pair."""
    from qlora_kit.analysis.page import figures, render_page
    from qlora_kit.core.atomic import atomic_write_text

    folder.mkdir(parents=True, exist_ok=True)
    texts = {"inspect.json": json.dumps(record) + "\n", "inspect.html": render_page(record)}
    for n, pair in enumerate(record["similarity"], start=1):
        drawn = figures(pair)
        texts |= {f"pair{n}-{k}.svg": str(svg) for k, svg in enumerate(drawn, start=1)}
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return [folder / name for name in texts]


def _sweep(line: CommandLine) -> int:
    kind = line.options["sweep"]
    if kind not in SWEEPS:
        raise ConfigError(f"--sweep takes {' or '.join(SWEEPS)}, got {kind!r}.")
    foreign = {"ranks": "budget", "matrices": "ranks"}[kind]
    if foreign in line.options:
        raise ConfigError(f"--{foreign} is not for --sweep {kind}. See `qlora-kit inspect --help`.")
    config = load_config(line, "inspect")
    setup_logging()
    quiet_progress()
    from qlora_kit.analysis.sweep import run_sweep, sweep_table

    folder = Path(line.options.get("out", f"sweep-{kind}"))
    record = run_sweep(kind, config, _cells(kind, config, line.options), folder)
    print(f"\n{sweep_table(kind, record['rows']).text()}\n{folder / 'sweep.json'}")
    return 0


def _cells(kind: str, config: "RunConfig", options: dict[str, str]) -> "list[Cell]":
    from qlora_kit.analysis.sweep import RANKS, budget_cells, linear_shapes, rank_cells

    seeds = _numbers(options, "seeds") or (config.train.seed,)
    groups = _groups(kind, options.get("groups"))
    shapes = linear_shapes(config, groups)
    if kind == "ranks":
        return rank_cells(groups, shapes, _numbers(options, "ranks") or RANKS, seeds)
    budget = _numbers(options, "budget")
    return budget_cells(groups, shapes, seeds, budget[0] if budget else None)


def _groups(kind: str, text: str | None) -> "list[Group]":
    """What was asked for, else the paper's groups of attention's matrices."""
    if text is not None:
        return [tuple(word.split(",")) for word in text.split()]
    q, k, v, o = _ATTENTION
    if kind == "ranks":
        return [(q,), (q, v), (q, k, v, o)]
    return [(q,), (k,), (v,), (o,), (q, k), (q, v), (q, k, v, o)]


def _numbers(options: dict[str, str], name: str) -> tuple[int, ...]:
    """Whole numbers of an option, none if it was not given."""
    words = options.get(name, "").replace(",", " ").split()
    if not all(word.isdigit() for word in words):
        raise ConfigError(f"--{name} takes whole numbers, as in 1,2,4; got {options[name]!r}.")
    return tuple(int(word) for word in words)
