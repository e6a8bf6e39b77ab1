"""The table of a train record: every row by case, and the targets met or missed.

    python -m benchmarks.train.table RECORD.json [MORE.json ...] [--beside PEERS.json ...]
                                     [--predict] [--merge OUT.json]

Several records of one commit and card (a long benchmark run in parts) become one with `--merge`;
`--beside` adds peers' rows that another commit measured on such a card, each with that commit;
`--predict` adds the planner's peaks, for which no GPU is needed. Rows of one shape are from the
same checkpoint and the same first batch, so their first losses have to agree; a row that does not
is marked, and meets no target.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.train.cases import CASES, Case
from qlora_kit.bench.flops import mfu
from qlora_kit.bench.predicted import add_predictions
from qlora_kit.bench.record import Row
from qlora_kit.bench.rows import mark_disagreements, peak_gib, shape_of, status

_SWITCHES = {"embeddings_on_host": "host embeddings", "deterministic": "deterministic"}
_SETTINGS = ("tile", "keep_decoded", *_SWITCHES)
"""What else than its policy makes a row of ours another; peers and older records have none."""


def counted(rows: Iterable[Row], case: str, impl: str) -> list[Row]:
    """Rows of a case and library that may be compared, fastest first."""
    fit = [
        row
        for row in rows
        if case in row["cases"] and row["impl"] == impl and "tokens_per_s" in row
    ]
    return sorted((r for r in fit if not status(r)), key=lambda r: -r["tokens_per_s"])


def _cell(row: Row, key: str, form: str, factor: float = 1.0) -> str:
    value = row.get(key)
    return "–" if value is None else format(value * factor, form)


def how(row: Row) -> str:
    """A row's policy, and what else it was run with.

    Args:
        row: of a record.

    Returns:
        Words for the table.

    Example:
        >>> how({"policy": "offload", "tile": 2048, "embeddings_on_host": True})
        'offload, tile 2048, host embeddings'
    """
    words = [str(row["policy"])]
    if row.get("tile", "auto") is None:
        words.append("no tiles")
    if isinstance(row.get("tile"), int):
        words.append(f"tile {row['tile']}")
    if row.get("keep_decoded"):
        words.append(f"{row['keep_decoded']} decoded")
    words += [text for key, text in _SWITCHES.items() if row.get(key)]
    return ", ".join(words)


def line(row: Row) -> str:
    """One row of the table."""
    who = row["impl"] + (f" ({row['variant']})" if row["variant"] else "")
    if row["impl"] == "qlora_kit":
        who += "" if row["method"] == "lora" else f" {row['method']}"
        who += f" [{row.get('step', '–')}{', graph' if row.get('graph') else ''}]"
    cells = [
        f"  {who:28} {how(row):34}",
        f"{_cell(row, 'tokens_per_s', ',.0f'):>8}",
        f"{_cell(row, 'mfu', '.1f', 100):>5}",
        f"{_cell(row, 'peak_allocated_gib', '.2f'):>6}",
        f"{_cell(row, 'peak_reserved_gib', '.2f'):>6}",
        f"{_cell(row, 'predicted_gib', '.2f'):>6}",
        f"{_cell(row, 'host_gib', '.1f'):>5}",
        f"{_cell(row, 'pinned_gib', '.1f'):>5}",
        f"{_cell(row, 'load_s', '.1f'):>5}",
        f"{_cell(row, 'first_step_s', '.1f'):>5}",
        f"{_cell(row, 'trainer_overhead', '+.1f', 100):>6}",
    ]
    return " ".join(cells) + "  " + status(row)


HEADER = (
    f"  {'':28} {'policy':34} {'tokens/s':>8} {'MFU %':>5} {'alloc.':>6} {'resv.':>6} {'pred.':>6}"
    f" {'host':>5} {'pinn.':>5} {'load':>5} {'1st s':>5} {'Tr. %':>6}"
)


def judge(case: Case, rows: Sequence[Row]) -> list[tuple[str, bool | None]]:
    """What a case asks for, in words, and whether the best of ours that fits gives it.

    Args:
        case: with its target.
        rows: of the record.

    Returns:
        Pairs of text and met; None where a measurement is missing.
    """
    target = case.target
    shape = (case.model, case.batch, case.seq)
    rows = [row for row in rows if shape_of(row) == shape]
    if not rows:
        return []
    ours = counted(rows, case.name, "qlora_kit")
    if target.peak_gib is not None:
        fitting = [r for r in ours if (peak_gib(r) or 0.0) <= target.peak_gib]
        ours = fitting or ours
    speed = ours[0]["tokens_per_s"] if ours else None
    peak = peak_gib(ours[0]) if ours else None
    unsloth = counted(rows, case.name, "unsloth")
    found: list[tuple[str, bool | None]] = []
    if target.tokens_per_s is not None:
        wanted = f">= {target.tokens_per_s:,.0f} tokens/s"
        found.append(_verdict(wanted, speed, target.tokens_per_s, ",.0f"))
    if target.over_unsloth is not None:
        ratio = speed / unsloth[0]["tokens_per_s"] if speed is not None and unsloth else None
        wanted = f">= {target.over_unsloth:.2f} x Unsloth"
        found.append(_verdict(wanted, ratio, target.over_unsloth, ".2f"))
    if target.peak_gib is not None:
        met = None if peak is None else peak <= target.peak_gib
        said = "not measured" if peak is None else f"{peak:.2f}"
        found.append((f"<= {target.peak_gib:g} GiB: {said}", met))
    return found


def _verdict(wanted: str, value: float | None, bound: float, form: str) -> tuple[str, bool | None]:
    if value is None:
        return f"{wanted}: not measured", None
    return f"{wanted}: {value:{form}}", value >= bound


def lora_fa_over_lora(rows: Sequence[Row]) -> list[str]:
    """LoRA-FA beside LoRA under each policy: speed and memory."""
    found = []
    for row in rows:
        if row["method"] != "lora_fa" or "tokens_per_s" not in row:
            continue
        same = ("model", "batch", "seq", "rank", "policy", "step", "cap_gib")
        for other in rows:
            beside = other["method"] == "lora" and other["impl"] == row["impl"]
            alike = all(row.get(k) == other.get(k) for k in (*same, *_SETTINGS))
            if beside and "tokens_per_s" in other and alike:
                speed = row["tokens_per_s"] / other["tokens_per_s"]
                text = f"  LoRA-FA, {how(row)}: {speed:.3f} x LoRA's tokens/s"
                mine, theirs = row.get("peak_allocated_gib"), other.get("peak_allocated_gib")
                if mine is not None and theirs is not None:
                    text += f", {mine - theirs:+.2f} GiB"
                found.append(text)
    return found


def profile_lines(rows: Sequence[Row]) -> list[str]:
    """Milliseconds by category of every profiled row."""
    profiled = [row for row in rows if row.get("profile_ms")]
    if not profiled:
        return []
    names = list(profiled[0]["profile_ms"])
    lines = ["milliseconds per step", "  " + " " * 52 + " ".join(f"{n[:8]:>8}" for n in names)]
    for row in profiled:
        who = f"{row['impl']} {row['method']} {row['batch']} x {row['seq']} {how(row)}"
        values = " ".join(f"{row['profile_ms'][n]:8.1f}" for n in names)
        lines.append(f"  {who[:52]:52}{values}")
    return lines


def report(rows: Sequence[Row]) -> str:
    """The whole table.

    Args:
        rows: of a record; first losses are compared and marked.

    Returns:
        Lines for a terminal.
    """
    mark_disagreements(rows)
    lines: list[str] = []
    for case in CASES:
        mine = [row for row in rows if case.name in row["cases"]]
        if not mine:
            continue
        shape = {(r["model"], r["batch"], r["seq"], r["rank"], r["cap_gib"]) for r in mine}
        for model, batch, seq, rank, cap in sorted(shape, key=str):
            room = "" if cap is None else f", at most {cap:g} GiB"
            lines.append(f"{case.name}: {model}, {batch} x {seq}, r {rank}{room}")
        lines.append(HEADER)
        lines += [line(row) for row in mine]
        for text, met in judge(case, mine):
            lines.append(f"    {'?' if met is None else 'met   ' if met else 'MISSED'} {text}")
        if case.name == "lora_fa":
            lines += lora_fa_over_lora(mine)
        lines.append("")
    return "\n".join([*lines, *profile_lines(rows)]).rstrip()


def merge(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several; a point measured again counts in its last version that was measured.

    Args:
        records: of the same benchmark, commit and card, oldest first.

    Returns:
        The record; peaks are means. Rows of a part that had other versions of libraries name them
        in `env`.

    Raises:
        SystemExit: they do not belong together.
    """
    for key in ("bench", "commit", "gpu"):
        values = {record[key] for record in records}
        if len(values) > 1:
            sys.exit(f"these records differ in {key}: {', '.join(map(str, values))}")
    rows: dict[tuple[Any, ...], Row] = {}
    for record in records:
        for row in record["rows"]:
            if "error" not in row or "error" in rows.get(key_of(row), row):
                rows[key_of(row)] = row | _other_versions(record, records[0])
    peaks = {
        key: statistics.mean(r["peaks"][key] for r in records if key in r["peaks"])
        for key in {key for record in records for key in record["peaks"]}
    }
    for row in rows.values():  # one card, one rate
        if row.get("tokens_per_s") and row.get("gflops_per_token") and "bf16_tflops" in peaks:
            flops = row["gflops_per_token"] * 1e9
            row["mfu"] = mfu(row["tokens_per_s"], flops, peaks["bf16_tflops"])
    commands = "; ".join(dict.fromkeys(record["command"] for record in records))
    return {**records[0], "command": commands, "peaks": peaks, "rows": list(rows.values())}


def _other_versions(record: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """`env`: what a record's libraries have for versions where the first one's differ."""
    known = first.get("env", {}).items()
    other = {name: is_ for name, is_ in record.get("env", {}).items() if (name, is_) not in known}
    return {"env": other} if other else {}


def with_peers(record: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A record with peers' rows of others, where it has none of its own.

    Args:
        record: of this commit.
        others: of such a card.

    Returns:
        A new record; rows that were added say `commit`, and keep the MFU of their own run.

    Raises:
        SystemExit: another card.
    """
    if any(other["gpu"] != record["gpu"] for other in others):
        sys.exit("these records are of different cards")
    rows = {key_of(row): row for row in record["rows"]}
    for other in others:
        for row in other["rows"]:
            if row["impl"] != "qlora_kit" and "tokens_per_s" in row:
                rows.setdefault(key_of(row), row | {"commit": row.get("commit", other["commit"])})
    return {**record, "rows": list(rows.values())}


def key_of(row: Row) -> tuple[Any, ...]:
    """What makes a row a measurement of its own.

    Args:
        row: of a record.

    Returns:
        Equal for two measurements of the same settings, whatever the case or commit.
    """
    keys = ("impl", "variant", "model", "batch", "seq", "method", "rank", "policy", "cap_gib")
    settings = _SETTINGS if row["impl"] == "qlora_kit" else ()
    return tuple(row.get(key) for key in (*keys, *settings))


def main(argv: list[str] | None = None) -> None:
    """Print the table of one or more records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--merge", type=Path, default=None, help="write them as one")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="peers of other commits")
    parser.add_argument("--predict", action="store_true", help="ours by the planner, too")
    arguments = parser.parse_args(argv)
    there = [file for file in arguments.records if file.exists()]
    for file in arguments.records:
        if file not in there:  # of a part that was cut short before its first row
            print(f"there is no {file}")
    if not there:
        sys.exit("no record to read")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in there]
    beside = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.beside]
    record = with_peers(merge(found), beside)
    if arguments.predict:
        if "gpu_memory_bytes" not in record:
            sys.exit("this record is too old to be predicted: it does not say how large the GPU is")
        add_predictions(record)
    print(report(record["rows"]))
    if arguments.merge is not None:
        arguments.merge.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(arguments.merge)


if __name__ == "__main__":
    main()
