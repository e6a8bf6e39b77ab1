"""What the records of the planner's grid have measured, counted noun by noun, and what is missing.

    python -m benchmarks.plan.coverage               # the newest records of every kind of card
    python -m benchmarks.plan.coverage RECORD ...

The nouns are those that plans are promised for: shapes, rows of a batch, tokens of a row,
activation policies, optimizers, methods; and the pairs of method and policy, where there can be a
run of both. A cell is covered by a row that was measured and predicted.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import RESULTS
from benchmarks.methods.cases import BY_NAME
from benchmarks.plan.plot import newest_records
from qlora_kit.bench.record import Row
from qlora_kit.block.policy import POLICIES
from qlora_kit.optim.create import FLAT_NAMES

MODELS = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Llama-3.3-70B", "Qwen3", "Gemma-3")
METHODS = ("lora", "lora_fa", "full")
OWN_POLICIES = ("save", "recompute_all")
"""Those of a model's own layers, which full fine-tuning has."""
MIXTURE = "a mixture"
ALIAS = {"adamw_bnb_8bit": "adamw_8bit"}
"""Two names of one optimizer."""
OPTIMIZERS = tuple(sorted({ALIAS.get(name, name) for name in FLAT_NAMES}))
NOUNS: dict[str, tuple[Any, ...]] = {
    "model": MODELS,
    "batch": (1, 2, 4, 8, 16),
    "sequence": tuple(512 << n for n in range(8)),
    "policy": (*POLICIES, MIXTURE),
    "optimizer": OPTIMIZERS,
    "method": METHODS,
    "bits": (4, 16),
    "method and policy": tuple(
        (method, policy)
        for method in METHODS
        for policy in (OWN_POLICIES if method == "full" else POLICIES)
    ),
}
"""Everything that must be there; shapes of one family count together."""


def facts_of(row: Row) -> dict[str, Any] | None:
    """What a row covers.

    Args:
        row: of a record of the grid, or of `benchmarks.plan.methods`.

    Returns:
        A cell for every noun; None where nothing was measured and predicted.

    Example:
        >>> row = {"model": "Qwen3-8B", "method": "lora", "bits": 4, "batch": 1, "seq": 512,
        ...     "policy": "save:2,offload", "optimizer": "adamw_bnb_8bit"}
        >>> found = facts_of({**row, "peak_allocated_gib": 1.0, "predicted_gib": 1.0})
        >>> found["model"], found["policy"], found["optimizer"]
        ('Qwen3', 'a mixture', 'adamw_8bit')
    """
    if row.get("peak_allocated_gib") is None or row.get("predicted_gib") is None:
        return None
    if "run" in row:
        row = _as_in_the_grid(row["run"])
    policy = MIXTURE if "," in row["policy"] else row["policy"]
    return {
        "model": next((one for one in MODELS if row["model"].startswith(one)), row["model"]),
        "batch": row["batch"],
        "sequence": row["seq"],
        "policy": policy,
        "optimizer": ALIAS.get(row["optimizer"], row["optimizer"]),
        "method": row["method"],
        "bits": row["bits"],
        "method and policy": (row["method"], policy),
    }


def _as_in_the_grid(run: dict[str, Any]) -> Row:
    case = BY_NAME[run["case"]]
    policy = "recompute_all" if run["recompute"] else "save"
    return {**run, "method": case.method, "bits": case.bits, "policy": policy}


def count(rows: Sequence[Row]) -> dict[str, Counter[Any]]:
    """How many rows cover each cell.

    Args:
        rows: of records.

    Returns:
        Noun to cells to numbers; cells that no noun asks for are counted, too.
    """
    found: dict[str, Counter[Any]] = {noun: Counter() for noun in NOUNS}
    for facts in filter(None, map(facts_of, rows)):
        for noun, cell in facts.items():
            found[noun][cell] += 1
    return found


def missing(rows: Sequence[Row]) -> list[tuple[str, Any]]:
    """Cells without a row.

    Args:
        rows: of records.

    Returns:
        Noun and cell.

    Example:
        >>> missing([])[0]
        ('model', 'Llama-3.2-1B')
    """
    found = count(rows)
    return [
        (noun, cell) for noun, cells in NOUNS.items() for cell in cells if not found[noun][cell]
    ]


def table(rows: Sequence[Row]) -> str:
    """Every cell with its number of rows, then those that are missing.

    Args:
        rows: of records.

    Returns:
        Lines.
    """
    found, lines = count(rows), []
    for noun, cells in NOUNS.items():
        told = [f"{_name(cell)} {found[noun][cell]}" for cell in cells]
        lines.append(f"{noun}: {', '.join(told)}")
    lacking = [f"{noun} {_name(cell)}" for noun, cell in missing(rows)]
    lines.append(f"missing: {'; '.join(lacking) or 'nothing'}")
    return "\n".join(lines)


def _name(cell: object) -> str:
    return " under ".join(cell) if isinstance(cell, tuple) else str(cell)


def recorded() -> list[Row]:
    """Rows of the newest records of every kind of card.

    Returns:
        Of the grid, and of the methods that are held to plans beside it.
    """
    files = [*newest_records(), *sorted((RESULTS / "plan_methods").glob("*.json"))]
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a cell is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="*")
    files = parser.parse_args(argv).records
    rows = [row for f in files for row in json.loads(f.read_text(encoding="utf-8"))["rows"]]
    rows = rows if files else recorded()
    print(table(rows))
    return 1 if missing(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
