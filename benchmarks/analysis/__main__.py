"""An inspection and sweeps as one benchmark record, and the figure of docs/analysis.md.

    qlora-kit inspect R8 R64_SAME_SEED R64_OTHER_SEED --modules q_proj v_proj --out inspected
    python -m benchmarks.analysis inspected [SWEEP ...] [--out FOLDER] [--figure FILE]

Three adapters are expected in this order: the figure shows how φ of the first with the
second, which started from the same random A, differs from φ with the third, which did not.
Measures nothing itself. What is kept: φ averaged over layers up to 16 rows, φ(8, 8) of every
layer, the first singular values of every ΔW, amplification at full rank and the factor of the
first directions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.record import ROOT, write_record
from qlora_kit.analysis.heat import Panel, heat_maps

_SPECTRUM = 8
"""Singular values kept of every module."""
_LAYER_RANK = 8
"""i and j of what is kept of every layer."""


def rows_of(inspected: dict[str, Any], sweeps: list[dict[str, Any]]) -> list[dict[str, object]]:
    """What a record keeps.

    Args:
        inspected: content of an `inspect.json`.
        sweeps: contents of `sweep.json` files.

    Returns:
        A row per adapter, per pair, and per run of a sweep.
    """
    rows = [_adapter(adapter) for adapter in inspected["adapters"]]
    rows += [_pair(pair) for pair in inspected["similarity"]]
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


def _name(path: str) -> str:
    """The run that an adapter's folder belongs to."""
    return Path(path).parent.name


def _short(value: object) -> object:
    """Numbers with four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _adapter(adapter: dict[str, Any]) -> dict[str, object]:
    modules = {line["module"]: dict(line) for line in adapter["modules"]}
    for line in adapter["amplification"] or ():
        last = {key: line[key][-1:] for key in ("by_delta", "by_weight", "by_random")}
        own = {key: line[key] for key in ("weight_norm", "expected_random", "factor")}
        own |= {"directions": line["directions"], "factors": [_short(x) for x in line["factors"]]}
        modules[line["module"]] |= own | {key: v[0] if v else None for key, v in last.items()}
    rows = []
    for line in modules.values():
        values = [_short(value) for value in line.pop("values")[:_SPECTRUM]]
        rows.append({key: _short(value) for key, value in line.items()} | {"values": values})
    kept = {key: adapter[key] for key in ("method", "rank")}
    return {"what": "adapter", "name": _name(adapter["path"]), **kept, "modules": rows}


def _pair(pair: dict[str, Any]) -> dict[str, object]:
    layers = [
        {
            "module": line["module"],
            "side": line["side"],
            "phi": line["phi"][line["i"].index(_LAYER_RANK)][line["j"].index(_LAYER_RANK)],
        }
        for line in pair["modules"]
        if _LAYER_RANK in line["i"] and _LAYER_RANK in line["j"]
    ]
    return {
        "what": "pair",
        "names": [_name(pair[key]) for key in ("first", "second")],
        "means": [entry for entry in pair["means"] if len(entry["phi"]) <= 16],
        "layers": layers,
        "layer_rank": _LAYER_RANK,
    }


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
