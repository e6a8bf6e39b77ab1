"""Sweeps over ranks and over matrices: the LoRA paper's Tables 6 and 5 on a run of one's own.

A sweep trains one run several times and changes nothing but which matrices are adapted
and with what rank. `rank_cells` takes every rank for every group of matrices (Table 6);
`budget_cells` gives every group the rank that spends about the same number of trained
parameters (Table 5). Counts come from the shapes of the model on the meta device. The
scale s = alpha/rank is that of the run file for every rank, so that ranks are compared
at one step size of ΔW; the paper keeps alpha instead.

Every cell is an ordinary run in a folder of its own. A finished one is not trained again,
so an interrupted sweep continues where it stopped.

Source: arXiv:2106.09685, sections 7.1 and 7.2, tables 5 and 6.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qlora_kit.adapters.targets import linear_targets
from qlora_kit.analysis.tables import Table
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.errors import ConfigError
from qlora_kit.export.naming import build_skeleton, is_transposed
from qlora_kit.train.config import RunConfig
from qlora_kit.train.record import package_versions, source_commit
from qlora_kit.train.run import run_training

RANKS = (1, 2, 4, 8, 64)
"""Of the paper's Table 6."""
Group = tuple[str, ...]
"""Names of the matrices that are adapted together."""
Shapes = dict[str, tuple[int, int]]
"""Module name to (out, in)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Example:
        >>> Cell(group=("q_proj", "v_proj"), rank=8, parameters=1024, seed=1).name
        'q_proj+v_proj-r8-s1'
    """

    group: Group
    """Matrices that are adapted."""
    rank: int
    """Of each."""
    parameters: int
    """Trained ones."""
    seed: int
    """Of the run."""

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{'+'.join(self.group)}-r{self.rank}-s{self.seed}"


def linear_shapes(config: RunConfig, groups: Sequence[Group]) -> list[Shapes]:
    """Find the matrices of every group, without reading a weight.

    Args:
        config: names the model.
        groups: name endings or `re:` patterns.

    Returns:
        Per group, module to (out, in).

    Raises:
        AdapterError: a pattern selects no linear.
        SourceError: the model cannot be found.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="no/such/model"), data=DataConfig(train="d"))
        >>> linear_shapes(run, [("q_proj",)])
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: ...
    """
    source = open_source(config.model.path, revision=config.model.revision)
    task = "SEQ_CLS" if config.model.task == "sequence_classification" else None
    model = build_skeleton(source, task_type=task)
    found = []
    for group in groups:
        shapes: Shapes = {}
        for name, module in linear_targets(model, group).items():
            sizes = tuple(module.get_parameter("weight").shape)
            out, in_ = reversed(sizes) if is_transposed(module) else sizes
            shapes[name] = (out, in_)
        found.append(shapes)
    return found


def per_rank(shapes: Shapes) -> int:
    """Trained parameters that each unit of rank costs: Σ (out + in).

    Args:
        shapes: of the matrices.

    Returns:
        The sum.

    Example:
        >>> per_rank({"h.0.q": (4, 6), "h.1.q": (4, 6)})
        20
    """
    return sum(out + in_ for out, in_ in shapes.values())


def rank_cells(
    groups: Sequence[Group], shapes: Sequence[Shapes], ranks: Sequence[int], seeds: Sequence[int]
) -> list[Cell]:
    """Every rank for every group: Table 6.

    Args:
        groups: matrices adapted together.
        shapes: of each group.
        ranks: to try.
        seeds: of runs.

    Returns:
        The runs.

    Example:
        >>> cells = rank_cells([("q",)], [{"h.0.q": (4, 6)}], (1, 2), (0,))
        >>> [(cell.rank, cell.parameters) for cell in cells]
        [(1, 10), (2, 20)]
    """
    return [
        Cell(group=group, rank=rank, parameters=rank * per_rank(sizes), seed=seed)
        for group, sizes in zip(groups, shapes, strict=True)
        for rank in ranks
        for seed in seeds
    ]


def budget_cells(
    groups: Sequence[Group],
    shapes: Sequence[Shapes],
    seeds: Sequence[int],
    budget: int | None = None,
) -> list[Cell]:
    """About the same number of trained parameters for every group: Table 5.

    Args:
        groups: matrices adapted together.
        shapes: of each group.
        seeds: of runs.
        budget: trained parameters; None: rank 2 of the group that costs most per rank, as
            in the paper.

    Returns:
        The runs; a rank is a whole number, so counts differ a little.

    Raises:
        ConfigError: the budget does not pay for rank 1 of some group.

    Example:
        >>> shapes = [{"h.0.q": (4, 4)}, {"h.0.q": (4, 4), "h.0.v": (4, 4)}]
        >>> [cell.rank for cell in budget_cells([("q",), ("q", "v")], shapes, (0,))]
        [4, 2]
    """
    costs = [per_rank(sizes) for sizes in shapes]
    wanted = 2 * max(costs) if budget is None else budget
    cells = []
    for group, cost in zip(groups, costs, strict=True):
        if wanted < cost:
            raise ConfigError(
                f"a budget of {wanted:,} parameters does not pay for rank 1 of "
                f"{', '.join(group)}, which takes {cost:,}. Raise --budget."
            )
        rank = round(wanted / cost)
        cells += [Cell(group=group, rank=rank, parameters=rank * cost, seed=s) for s in seeds]
    return cells


def cell_config(config: RunConfig, cell: Cell, folder: Path) -> RunConfig:
    """Change a run to that of a cell.

    Args:
        config: the run.
        cell: what differs.
        folder: of the sweep.

    Returns:
        The run to train: same scale s, nothing merged, nothing generated for show.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="d"))
        >>> cell = Cell(group=("q_proj",), rank=4, parameters=1, seed=0)
        >>> cell_config(run, cell, Path("sweep")).adapter.alpha
        8.0
    """
    old = config.adapter
    scale = old.alpha / (old.rank**0.5 if config.method == "rslora" or old.rslora else old.rank)
    alpha = scale * (cell.rank**0.5 if config.method == "rslora" or old.rslora else cell.rank)
    adapter = replace(
        old, rank=cell.rank, alpha=alpha, targets=cell.group, rank_pattern={}, alpha_pattern={}
    )
    return replace(
        config,
        adapter=adapter,
        train=replace(config.train, seed=cell.seed, loggers=()),
        eval=replace(config.eval, before=False, samples=0),
        export=replace(config.export, merge=False),
        output=str(folder / cell.name),
        resume=False,
        overwrite=True,
    )


def run_sweep(
    kind: str,
    config: RunConfig,
    cells: Sequence[Cell],
    folder: Path,
    *,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train every cell that is not finished, and write `sweep.json` and `sweep.md`.

    Args:
        kind: `ranks` or `matrices`.
        config: the run that is changed.
        cells: of `rank_cells` or `budget_cells`.
        folder: of the sweep.
        say: takes a line when a cell begins.

    Returns:
        The record: rows with what was adapted and the held-out results.

    Raises:
        ConfigError: the run holds nothing out.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="d"))
        >>> run_sweep("ranks", run, [], Path("sweep"))
        Traceback (most recent call last):
        qlora_kit.core.errors.ConfigError: a sweep compares held-out losses: set data.eval ...
    """
    if not (config.data.eval or config.data.eval_sets or config.data.eval_fraction):
        raise ConfigError(
            "a sweep compares held-out losses: set data.eval or data.eval_fraction in the run file."
        )
    rows = []
    for number, cell in enumerate(cells, start=1):
        run = cell_config(config, cell, folder)
        record = _finished(run)
        done = ", finished before" if record else ""
        say(f"{number}/{len(cells)}: {cell.name}, {cell.parameters:,} trained parameters{done}")
        if record is None:
            record = run_training(run).record
        rows.append(_row(cell, record))
        result = {
            "bench": f"sweep of {kind}",
            "commit": source_commit(),
            "versions": package_versions(),
            "config": asdict(config),
            "rows": rows,
        }
        atomic_write_text(folder / "sweep.json", json.dumps(result, indent=1) + "\n")
        table = sweep_table(kind, rows)
        atomic_write_text(folder / "sweep.md", f"{table.title}\n\n{table.markdown()}\n")
    return result


def _finished(run: RunConfig) -> dict[str, Any] | None:
    """The record of a cell that was trained with these settings before."""
    file = Path(run.output) / "run.json"
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record if record["config"] == json.loads(json.dumps(asdict(run))) else None


def _row(cell: Cell, record: dict[str, Any]) -> dict[str, Any]:
    first = record["after"][0]
    return {
        "group": list(cell.group),
        "rank": cell.rank,
        "parameters": cell.parameters,
        "seed": cell.seed,
        "set": first["name"],
        "loss": first["loss"],
        "scores": first["scores"],
        "seconds": record["seconds"],
    }


def sweep_table(kind: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Put a sweep's results in a table.

    Args:
        kind: `ranks`: a line per group, a column per rank; `matrices`: a line per group.
        rows: of the record.

    Returns:
        Held-out losses, means over seeds with ± the standard deviation, and scores.

    Example:
        >>> row = {"group": ["q"], "rank": 2, "parameters": 20, "seed": 0, "loss": 0.5,
        ...     "scores": {"accuracy": 0.8}}
        >>> sweep_table("matrices", [row]).rows
        [('q', '2', '20', '0.5000', '80.0%')]
    """
    groups = list(dict.fromkeys(tuple(row["group"]) for row in rows))
    if kind == "ranks":
        ranks = sorted({row["rank"] for row in rows})
        lines = [
            (", ".join(group), *(_shown(rows, group, rank) for rank in ranks)) for group in groups
        ]
        return Table("Held-out loss by rank", ("adapted", *(f"r = {r}" for r in ranks)), lines)
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    lines = []
    for group in groups:
        mine = [row for row in rows if tuple(row["group"]) == group]
        scores = (f"{mean(row['scores'][name] for row in mine):.1%}" for name in names)
        rank, count = mine[0]["rank"], mine[0]["parameters"]
        lines.append(
            (", ".join(group), str(rank), f"{count:,}", _shown(rows, group, rank), *scores)
        )
    header = ("adapted", "r", "trained parameters", "held-out loss", *names)
    return Table("Held-out loss at about one number of trained parameters", header, lines)


def _shown(rows: Sequence[dict[str, Any]], group: Group, rank: int) -> str:
    found = [r["loss"] for r in rows if tuple(r["group"]) == group and r["rank"] == rank]
    if not found:
        return "-"
    spread = f" ± {stdev(found):.4f}" if len(found) > 1 else ""
    return f"{mean(found):.4f}{spread}"
