"""The parts of `qlora-kit search` that hold the model: rows, losses, progress, tables."""

import argparse
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.glora.config import FORMS, Structure
from qlora_kit.adapters.super_net.search import (
    Found,
    SearchResult,
    SearchSettings,
    random_structures,
)
from qlora_kit.adapters.super_net.structures import Candidate, count_values, super_net_pieces
from qlora_kit.analysis.tables import Table
from qlora_kit.cli.target import Target, class_names, load_target
from qlora_kit.core.errors import ConfigError
from qlora_kit.train.callbacks import make_progress
from qlora_kit.train.config import RunConfig
from qlora_kit.train.data.collate import make_collator
from qlora_kit.train.data.dataset import build_dataset, eval_names
from qlora_kit.train.glora import loss_of, search_structures

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from qlora_kit.train.data.tokenized import TokenizedSet

BEST = 10
"""Candidates whose structures are written."""
SHOWN = 3
"""Of them, those in the table."""


def split_rows(count: int, wanted: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Divide held-out rows at random: one part to search on, the others to judge by.

    Args:
        count: held-out rows.
        wanted: rows to search on; None: half of them.
        seed: of the draw.

    Returns:
        Row numbers of both parts, ascending.

    Raises:
        ConfigError: a part would be empty.

    Example:
        >>> [len(part) for part in split_rows(9, None, 0)], len(split_rows(9, 2, 0)[0])
        ([4, 5], 2)
    """
    if count < 2:
        raise ConfigError(
            f"a search needs two held-out rows at least, one to search on and one to judge by: the "
            f"run has {count}. Train with a larger data.eval or data.eval_fraction."
        )
    wanted = count // 2 if wanted is None else wanted
    if not 1 <= wanted < count:
        raise ConfigError(
            f"--rows must leave held-out rows to judge by: between 1 and {count - 1:,} of the "
            f"run's {count:,}, got {wanted:,}."
        )
    searched = set(random.Random(f"rows:{seed}").sample(range(count), wanted))
    return sorted(searched), [row for row in range(count) if row not in searched]


@dataclass(frozen=True, slots=True)
class _Part:
    """Held-out rows, collated."""

    rows: int
    batches: list[dict[str, Any]]


class Work:
    """The model with its super-net, and rows to measure it on."""

    def __init__(
        self,
        options: argparse.Namespace,
        run_config: RunConfig,
        target: Target,
        settings: SearchSettings,
    ) -> None:
        """Load the model and the run's held-out rows.

        Args:
            options: the command's flags.
            run_config: the run as it was started.
            target: its super-net.
            settings: of the search.

        Raises:
            ConfigError: there are no held-out rows, or too few.
        """
        names = eval_names(run_config.data)
        self.set = options.set or next(iter(names), "")
        if self.set not in names:
            raise ConfigError(
                f"--set {options.set}: the run's held-out sets are {', '.join(names)}."
                if names
                else f"{options.run} held out no rows, and on rows it was trained on the largest "
                "structure always looks best. Train with data.eval or data.eval_fraction."
            )
        self.options, self.target, self.settings = options, target, settings
        self.model, self.adapter, data = self._load(run_config)
        size = options.batch_size or run_config.eval.batch_size
        parts = split_rows(len(data), options.rows, settings.seed)
        searched, others = (_part(data, rows, size) for rows in parts)
        self.parts = {"searched": searched, "others": others}
        self.console = Console(file=sys.stderr)
        self.pieces = super_net_pieces(self.adapter)
        self.whole = tuple(piece.structure for piece in self.pieces)
        self.largest = count_values(self.pieces, self.whole)

    def _load(
        self, run_config: RunConfig
    ) -> "tuple[PreTrainedModel, AttachedAdapter, TokenizedSet]":
        model, tokenizer, adapter = load_target(self.target, self.options)
        assert isinstance(adapter, AttachedAdapter)
        data = build_dataset(
            run_config.data,
            tokenizer,
            self.set,
            task=self.target.task,
            labels=run_config.model.labels or class_names(model),
            seed=run_config.train.seed,
        )
        return model, adapter, data

    def search(self, limit: int) -> SearchResult:
        """Search, with progress on standard error.

        Args:
            limit: most trained values.

        Returns:
            What was found.
        """
        settings, console = self.settings, self.console
        searched, others = (part.rows for part in self.parts.values())
        total = settings.population * settings.generations
        console.print(
            f"search: up to {total:,} candidates of at most {limit:,} values, on {searched:,} rows "
            f"of {self.set}; {others:,} other rows judge",
            highlight=False,
            soft_wrap=True,
        )
        with _bar(console) as progress:
            watch = _Watch(progress, settings)
            found = search_structures(
                self.model,
                self.adapter,
                self.parts["searched"].batches,
                limit=limit,
                settings=settings,
                watch=watch,
            )
            watch.say()
        return found

    def record(self, found: SearchResult, limit: int) -> dict[str, Any]:
        """Measure what the table compares, and collect the history.

        Args:
            found: of the search.
            limit: of the search.

        Returns:
            The content of `search.json`.
        """
        best = [self._described(one.structures, one.loss) for one in found.ranking(BEST)]
        drawn = random_structures(
            self.adapter,
            size=found.best.parameters,
            count=self.options.controls,
            seed=self.settings.seed,
        )
        control = [self._described(structures) for structures in drawn]
        base: dict[str, Any] = {"parameters": 0, "loss": {}}
        super_net = self._described(self.whole)
        lines = [base, super_net, *best[:SHOWN], *control]
        todo = [(one, part) for one in lines for part in self.parts if part not in one["loss"]]
        self.console.print(f"compare: {len(todo)} losses", highlight=False)
        with _bar(self.console) as progress:
            task = progress.add_task("compare", total=len(todo), note="")
            for one, part in todo:
                one["loss"][part] = self._loss(one, part)
                progress.advance(task)
        return {
            "format": 1,
            "run": self.options.run,
            "base_model": self.target.base,
            "limit": limit,
            "settings": asdict(self.settings),
            "rows": {"set": self.set} | {name: part.rows for name, part in self.parts.items()},
            "base": base,
            "super_net": super_net,
            "best": best,
            "random": control,
            "best_by_generation": found.best_by_generation,
            "candidates": [
                {"generation": f.generation, "loss": f.loss, "parameters": f.parameters}
                for f in found.candidates
            ],
        }

    def _described(self, structures: Candidate, loss: float | None = None) -> dict[str, Any]:
        """Plain values of one line: trained values, losses by part, and the forms."""
        places = [piece.place for piece in self.pieces]
        return {
            "parameters": count_values(self.pieces, structures),
            "loss": {} if loss is None else {"searched": loss},
            "structures": dict(zip(places, map(str, structures), strict=True)),
        }

    def _loss(self, line: dict[str, Any], part: str) -> float:
        """The loss of a line on a part of the rows; of the base where it has no structures."""
        batches = self.parts[part].batches
        if "structures" not in line:
            with self.adapter.disabled():
                return loss_of(self.model, self.adapter, batches)
        structures = tuple(map(Structure.parse, line["structures"].values()))
        return loss_of(self.model, self.adapter, batches, structures)


def _part(data: "TokenizedSet", rows: list[int], size: int) -> _Part:
    """Rows of similar length together, the longest first."""
    collate = make_collator(data)
    order = sorted(rows, key=lambda row: -data.lengths[row])
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    return _Part(len(rows), [collate([data[row] for row in chunk]) for chunk in chunks])


def _bar(console: Console) -> "Progress":
    """A progress bar that stays away where there is no terminal."""
    progress = make_progress(console)
    progress.disable = not console.is_terminal
    return progress


class _Watch:
    """A bar on a terminal, one line for every generation elsewhere."""

    def __init__(self, progress: "Progress", settings: SearchSettings) -> None:
        self.progress = progress
        self.generation, self.measured = 0, 0
        self.best: Found | None = None
        total = settings.population * settings.generations
        self.task = progress.add_task("search", total=total, note="")

    def __call__(self, found: Found) -> None:
        if found.generation != self.generation:
            self.say()
            self.generation = found.generation
        self.measured += 1
        if self.best is None or found.loss < self.best.loss:
            self.best = found
        note = f"best {self.best.loss:.4f}"
        self.progress.update(self.task, completed=self.measured, note=note)

    def say(self) -> None:
        """One line for the generation that ends, where there is no bar."""
        if self.best is None or self.progress.console.is_terminal:
            return
        self.progress.console.print(
            f"generation {self.generation + 1}: {self.measured:,} candidates, best loss "
            f"{self.best.loss:.4f} with {self.best.parameters:,} values",
            highlight=False,
        )


def print_tables(record: dict[str, Any]) -> None:
    """Print who has which loss, and which forms were chosen.

    Args:
        record: of `Work.record`.

    Example:
        >>> one = {"parameters": 3, "loss": {"searched": 0.5, "others": 0.75}}
        >>> found = one | {"structures": {"q_proj": "lora none none none scalar"}}
        >>> print_tables({"rows": {"searched": 4, "others": 5}, "base": one, "super_net": one,
        ...     "best": [found], "random": [one, one]})
        <BLANKLINE>
        held-out loss, on rows searched on and on others
          structures                    values  4 searched  5 other
          base                               3      0.5000   0.7500
          super-net, largest structure       3      0.5000   0.7500
          found                              3      0.5000   0.7500
          random, mean of 2                  3      0.5000   0.7500
        <BLANKLINE>
        forms found, in 1 linears
          A: lora 1
          B: none 1
          C: none 1
          D: none 1
          E: scalar 1
    """
    best = record["best"]
    lines = [("base", record["base"]), ("super-net, largest structure", record["super_net"])]
    lines += [("found", best[0])]
    lines += [(f"  number {n}", one) for n, one in enumerate(best[1:SHOWN], start=2)]
    control = record["random"]
    mean = {
        "parameters": round(sum(one["parameters"] for one in control) / len(control)),
        "loss": {
            part: sum(one["loss"][part] for one in control) / len(control)
            for part in ("searched", "others")
        },
    }
    lines.append((f"random, mean of {len(control)}", mean))
    cells: list[tuple[str, ...]] = [
        (
            name,
            f"{one['parameters']:,}",
            f"{one['loss']['searched']:.4f}",
            f"{one['loss']['others']:.4f}",
        )
        for name, one in lines
    ]
    rows = record["rows"]
    header = ("structures", "values", f"{rows['searched']:,} searched", f"{rows['others']:,} other")
    print(f"\n{Table('held-out loss, on rows searched on and on others', header, cells).text()}")
    chosen = [text.split() for text in best[0]["structures"].values()]
    used = [
        (support.upper(), ", ".join(f"{form} {n}" for form, n in Counter(forms).most_common()))
        for support, forms in zip(FORMS, zip(*chosen, strict=True), strict=True)
    ]
    title = f"\nforms found, in {len(chosen)} linears"
    print("\n".join([title, *(f"  {support}: {text}" for support, text in used)]))
