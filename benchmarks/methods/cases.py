"""What is compared: methods with their settings and learning rates, tasks with their budgets.

Every method sees the same rows in the same order for a seed, for the same number of updates.
Rank 16 at scale 2 is what LoRA and its relatives get; the others have their own defaults.
The three learning rates of a method are a starting grid, not a claim: the best of them on
validation rows is taken, and where that is the outermost one, the next beyond is tried too.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.record import ROOT
from qlora_kit.adapters.adalora.config import RankBudget
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning

DEMO = ROOT / "demo"
MODEL = DEMO / "smollm2-135m-instruct.gguf"
GRID_STEP = 10**0.5
"""Between neighbouring learning rates."""
WIDER = 2
"""Rates tried at most beyond the grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One method as it is compared."""

    name: str
    """In the record."""
    label: str
    """In the table."""
    method: str
    """Of the run."""
    rate: float
    """Middle of the grid of learning rates."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Sections of the run that differ from its defaults."""
    timed: dict[str, Any] = field(default_factory=dict)
    """Sections that differ while steps are timed."""
    bits: int = 4
    """Of the base."""

    @property
    def grid(self) -> tuple[float, ...]:
        """Learning rates to try first.

        Example:
            >>> Case(name="x", label="x", method="lora", rate=1e-3).grid
            (0.000316, 0.001, 0.00316)
        """
        return self.beyond(-1), self.rate, self.beyond(1)

    @property
    def needs_originals(self) -> bool:
        """Whether it starts from the weights before they were quantized."""
        adapter = self.settings.get("adapter")
        return adapter is not None and adapter.init == "loftq"

    def beyond(self, steps: int) -> float:
        """The rate so many steps of the grid from the middle, to three digits."""
        return float(f"{self.rate * GRID_STEP**steps:.3g}")


def _lora(name: str, label: str, rate: float, *, method: str = "lora", **fields: Any) -> Case:
    adapter = LoRA(**{"rank": 16, "alpha": 32.0, **fields})
    return Case(name=name, label=label, method=method, rate=rate, settings={"adapter": adapter})


def _bottleneck(name: str, label: str, **fields: Any) -> Case:
    settings = {"bottleneck": Bottleneck(**fields)}
    return Case(name=name, label=label, method="bottleneck", rate=1e-3, settings=settings)


def _prefix(name: str, label: str, **fields: Any) -> Case:
    settings = {"prefix_tuning": PrefixTuning(**fields)}
    return Case(name=name, label=label, method="prefix_tuning", rate=1e-3, settings=settings)


def _prompt(name: str, label: str, rate: float, **fields: Any) -> Case:
    settings = {"prompt_tuning": PromptTuning(**fields)}
    return Case(name=name, label=label, method="prompt_tuning", rate=rate, settings=settings)


CASES = (
    _lora("lora", "LoRA r 16", 1e-3),
    _lora("rslora", "rsLoRA r 16", 3e-4, method="rslora"),
    _lora("lora_plus", "LoRA+, ratio 16", 3e-4, lr_ratio_b=16.0),
    _lora("lora_fa", "LoRA-FA r 16", 3e-3, method="lora_fa"),
    _lora(
        "lora_fa_corrected",
        "LoRA-FA r 16, corrected",
        3e-3,
        method="lora_fa",
        corrected_gradient=True,
    ),
    _lora("pissa", "LoRA r 16 from PiSSA", 3e-4, init="pissa"),
    _lora("loftq", "LoRA r 16 from LoftQ", 1e-3, init="loftq"),
    _lora("dora", "DoRA r 16", 1e-3, method="dora"),
    Case(
        name="adalora",
        label="AdaLoRA r 24 → 16",
        method="adalora",
        rate=3e-3,
        settings={"adapter": LoRA(rank=24, alpha=48.0), "adalora": RankBudget(every=5)},
        timed={"adalora": RankBudget(every=5, final_updates=0)},  # ranks fall all the time
    ),
    Case(name="glora", label="GLoRA r 4, all supports", method="glora", rate=1e-3),
    _bottleneck("houlsby", "Houlsby, d/16"),
    _bottleneck("pfeiffer", "Pfeiffer, d/16", kind="pfeiffer"),
    _bottleneck("lin", "Lin (AdapterL), d/16", kind="lin"),
    _bottleneck(
        "adapter_drop", "AdapterDrop, Pfeiffer without 5 layers", kind="pfeiffer", drop_layers=5
    ),
    _prefix("prefix", "prefix-tuning, 10"),
    _prefix("infix", "prefix-tuning, 10, infix", place="infix"),
    _prompt("prompt", "prompt-tuning, 10", 3e-2),
    _prompt("prelayer", "PreLayer, 10", 1e-2, layers="all"),
    Case(name="bitfit", label="BitFit", method="bitfit", rate=3e-3),
    Case(name="top_k", label="last 2 blocks", method="top_k", rate=3e-4),
    Case(name="full", label="full, 16-bit base", method="full", rate=1e-4, bits=16),
)
BY_NAME = {case.name: case for case in CASES}
DEMO_SHAPE = "demo"
"""The name of a shape that is the demo model."""
REFERENCE = "lora"
"""Others' step times are given in units of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A data set, its budget, and how answers are judged."""

    name: str
    """In the record."""
    train: str
    """Rows, the last of which are for choosing a learning rate."""
    test: str
    """Rows that are reported."""
    evaluation: str
    """`choice` or `exact_match`."""
    metric: str
    """The score of that."""
    updates: int
    tuning_updates: int
    """While a learning rate is chosen, the schedule shortened to so many."""
    batch: int
    validation_rows: int
    test_rows: int
    eval_batch: int
    """Rows; of generation as well."""
    longest: int = 128
    """Tokens of a row."""
    new_tokens: int = 48
    """Longest generated answer."""
    system_prompt: str | None = None

    @property
    def train_rows(self) -> int:
        """Rows trained on, each once."""
        return self.updates * self.batch


TASKS = (
    Task(
        name="reviews",
        train="rotten_tomatoes/train.jsonl",
        test="rotten_tomatoes/test.jsonl",
        evaluation="choice",
        metric="accuracy",
        updates=60,
        tuning_updates=24,
        batch=16,
        validation_rows=500,
        test_rows=1000,
        eval_batch=250,
    ),
    Task(
        name="commands",
        train="home_assistant/train.jsonl",
        test="home_assistant/test_seen.jsonl",
        evaluation="exact_match",
        metric="exact_match",
        updates=40,
        tuning_updates=20,
        batch=32,
        validation_rows=500,
        test_rows=512,
        eval_batch=512,
        system_prompt="Turn the voice command into JSON.",
    ),
)
"""Reviews are the quickstart's rows and budget; commands the second example's, for 40 updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Where a step is timed: a model and one shape of batch."""

    name: str
    """`demo` for the demo model, else a shape of `qlora_kit.bench.shapes`, random weights."""
    batch: int
    seq: int
    warmup: int = 4
    """Steps before; a CUDA graph is recorded at the third of a shape."""
    steps: int = 10
    """Timed; their median counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing for a worker to do."""

    what: str
    """`speed`, `base`, `tune` or `run`."""
    case: str | None = None
    """None: the base model alone."""
    task: str | None = None
    """None: random tokens of a shape."""
    shape: str | None = None
    rate: float | None = None
    seed: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """What tells jobs apart; a `run` has whichever rate was chosen."""
        rate = None if self.what == "run" else self.rate
        return self.what, self.case, self.task, self.shape, rate, self.seed

    def __str__(self) -> str:
        """One line for people."""
        words = (self.what, self.case, self.task, self.shape)
        said = " ".join(word for word in words if word)
        rate = "" if self.rate is None else f" at {self.rate:g}"
        return said + rate + (f" seed {self.seed}" if self.what in ("run", "tune") else "")


def split_rows(task: Task, demo: Path, folder: Path) -> dict[str, Path]:
    """Write the rows to train on and those to choose a learning rate on.

    The validation rows are the last of the file; what is trained on is the first ones, so the
    two never meet, and neither holds a row of the test file.

    Args:
        task: names the files.
        demo: folder of the data, as scripts/prepare_demo.py lays it out.
        folder: to write to.

    Returns:
        Paths of `train`, `tuning` (the first of `train`), `validation` and `test`.

    Raises:
        SystemExit: there are too few rows, or no data.
    """
    source = demo / task.train
    if not source.exists():
        raise SystemExit(f"{source} is missing: run python scripts/prepare_demo.py all")
    lines = source.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(lines) < task.train_rows + task.validation_rows:
        raise SystemExit(f"{source} has {len(lines)} rows; {task} needs more")
    parts = {
        "train": lines[: task.train_rows],
        "tuning": lines[: task.tuning_updates * task.batch],
        "validation": lines[-task.validation_rows :],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{task.name}-{name}.jsonl" for name in parts}
    for name, rows in parts.items():
        paths[name].write_text("\n".join(rows) + "\n", encoding="utf-8")
    return paths | {"test": demo / task.test}


def budget_row(
    tasks: Sequence[Task], shapes: Sequence[Shape], cases: Sequence[Case], **more: object
) -> dict[str, Any]:
    """The row of a record that says what every training had.

    Args:
        tasks: with the budgets that were used.
        shapes: at which steps were timed.
        cases: methods that were asked for.
        **more: values to add.

    Returns:
        A row.
    """
    described = {"tasks": [asdict(t) for t in tasks], "shapes": [asdict(s) for s in shapes]}
    plain: list[dict[str, Any]] = json.loads(json.dumps([asdict(case) for case in cases]))
    return {"what": "budget", **described, "cases": plain, **more}
