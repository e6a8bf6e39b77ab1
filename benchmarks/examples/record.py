"""Finished runs of the examples as one benchmark record.

    qlora-kit train examples/quickstart.yaml
    python -m benchmarks.examples.record runs/quickstart [more runs ...] [--out FOLDER]

Reads each run's `run.json`; measures nothing itself. The rows keep what a claim
needs: settings that matter, held-out results before and after, speed and memory.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.record import write_record


def _scores(held_out: dict[str, Any]) -> dict[str, object]:
    """One held-out set's figures, without its texts: those are not ours to publish."""
    return {key: value for key, value in held_out.items() if key != "answers"}


def row_of(run: dict[str, Any]) -> dict[str, object]:
    """What a record keeps of one run.

    Args:
        run: the content of its `run.json`.

    Returns:
        One row.
    """
    config = run["config"]
    return {
        "example": Path(config["output"]).name,
        "model": config["model"]["path"],
        "bits": config["model"]["bits"],
        "dtype": run["model"]["dtype"],
        "method": config["method"],
        "rank": config["adapter"]["rank"],
        "learning_rate": config["train"]["learning_rate"],
        "batch": config["train"]["batch_size"],
        "seed": config["train"]["seed"],
        "train_rows": run["data"]["train"]["rows"],
        "updates": run["training"]["updates"],
        "tokens_per_s": run["training"]["tokens_per_s"],
        "train_seconds": run["training"]["seconds"],
        "seconds": run["seconds"],
        "before": [_scores(held_out) for held_out in run["before"]],
        "after": [_scores(held_out) for held_out in run["after"]],
        "merge": None if run["merge"] is None else run["merge"]["deviation"],
        "memory": run["memory"],
        "device": run["environment"]["device"],
    }


def main() -> None:
    """Collect the runs, print a line each, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of `qlora-kit train`")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    rows = [row_of(json.loads((run / "run.json").read_text())) for run in arguments.runs]
    for row in rows:
        print(row["example"], row["method"], f"{row['seconds']:.0f} s", row["after"])
    print(write_record("examples", rows, folder=arguments.out))


if __name__ == "__main__":
    main()
