"""An inspection and sweeps as one benchmark record, and the figure of docs/analysis.md.

    qlora-kit inspect R8 R64_SAME_SEED R64_OTHER_SEED --modules q_proj v_proj --out inspected
    python -m benchmarks.analysis inspected [SWEEP ...] [--out FOLDER] [--figure FILE]

Three adapters are expected in this order: the figure shows how φ of the first with the
second, which started from the same random A, differs from φ with the third, which did not.
Measures nothing itself. Averages over layers are kept in full, single modules at powers of
two.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.record import ROOT, write_record
from qlora_kit.analysis.heat import Panel, heat_maps

_KEPT = ("method", "rank", "modules", "amplification")


def rows_of(inspected: dict[str, Any], sweeps: list[dict[str, Any]]) -> list[dict[str, object]]:
    """What a record keeps.

    Args:
        inspected: content of an `inspect.json`.
        sweeps: contents of `sweep.json` files.

    Returns:
        A row per adapter, per pair, and per run of a sweep.
    """
    rows: list[dict[str, object]] = []
    for adapter in inspected["adapters"]:
        name = Path(adapter["path"]).parent.name
        rows.append({"what": "adapter", "name": name} | {key: adapter[key] for key in _KEPT})
    for pair in inspected["similarity"]:
        names = [Path(pair[key]).parent.name for key in ("first", "second")]
        means = [entry for entry in pair["means"] if len(entry["phi"]) <= 16]
        rows.append({"what": "pair", "names": names, "means": means, "modules": pair["modules"]})
    for sweep in sweeps:
        config = sweep["config"]
        settings = {
            "model": config["model"]["path"],
            "bits": config["model"]["bits"],
            "train_rows": config["data"]["limit_train"],
            "held_out_rows": config["data"]["limit_eval"],
            "scale": config["adapter"]["alpha"] / config["adapter"]["rank"],
        }
        rows += [{"what": sweep["bench"], **settings, **row} for row in sweep["rows"]]
    return rows


def figure(inspected: dict[str, Any], kind: str = "self_attn.q_proj") -> str:
    """Draw φ for A and B: same seed, another seed, random.

    Args:
        inspected: content of an `inspect.json` of three adapters.
        kind: of modules.

    Returns:
        An SVG.
    """
    same, other = inspected["similarity"][:2]
    panels = []
    for side in ("A", "B"):
        (one,) = (e for e in same["means"] if e["side"] == side and e["kind"] == kind)
        (two,) = (e for e in other["means"] if e["side"] == side and e["kind"] == kind)
        panels += [
            Panel(title=f"{side}, same seed", values=one["phi"]),
            Panel(title=f"{side}, another seed", values=two["phi"]),
            Panel(title=f"{side}, random", values=two["random"]),
        ]
    return heat_maps(
        panels,
        title=f"φ(i, j) of {kind.rpartition('.')[2]}, mean over {one['layers']} layers",
        x_label="j, directions of the adapter of rank 64",
        y_label="i, directions of rank 8",
        top=1.0,
        across=3,
    )


def main(words: list[str] | None = None) -> None:
    """Read, write the record and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("inspected", type=Path, help="folder of an inspection")
    parser.add_argument("sweeps", type=Path, nargs="*", help="folders of sweeps")
    parser.add_argument("--out", type=Path, help="folder of records")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "analysis.svg")
    options = parser.parse_args(words)
    inspected = json.loads((options.inspected / "inspect.json").read_text(encoding="utf-8"))
    sweeps = [json.loads((s / "sweep.json").read_text(encoding="utf-8")) for s in options.sweeps]
    print(write_record("analysis", rows_of(inspected, sweeps), folder=options.out))
    options.figure.write_text(figure(inspected) + "\n", encoding="utf-8")
    print(options.figure)


if __name__ == "__main__":
    main()
