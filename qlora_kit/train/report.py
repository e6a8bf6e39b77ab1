"""The run report: one HTML file that needs nothing else, for a person to read.

Made from the record (`run.json`) alone, so it can be made again at any time. The
page lives in `report.html.j2`; this module prepares what it shows. Prompts and
answers are untrusted text: everything is escaped, and the page forbids itself to
load anything or to run scripts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.units import format_bytes
from qlora_kit.train.charts import Series, line_chart, smooth
from qlora_kit.train.config import (
    DataConfig,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from qlora_kit.train.rank_picture import rank_map
from qlora_kit.train.record import result_from_dict
from qlora_kit.train.summary import count, duration, metric_rows

_BETTER_BELOW = ("loss", "perplexity")
_SMOOTH_ABOVE = 40  # log lines from which on the loss is drawn smoothed, the raw values behind it


def write_report(record: Mapping[str, Any], path: Path) -> None:
    """Write the report of a run.

    Args:
        record: content of `run.json`.
        path: the HTML file; replaced if it exists.

    Example:
        >>> write_report.__name__  # a whole use: qlora_kit.train.run
        'write_report'
    """
    atomic_write_text(path, render_report(record))


def render_report(record: Mapping[str, Any]) -> str:
    """Make the page.

    Args:
        record: content of `run.json`.

    Returns:
        A complete HTML document without references to anything outside.

    Example:
        >>> render_report.__name__  # a whole use: tests/train/test_report.py
        'render_report'
    """
    config = record["config"]
    return _template().render(
        title=Path(config["output"]).name,
        record=record,
        config=config,
        tiles=_tiles(record),
        sets=_sets(record),
        charts=_charts(record["training"]["history"]) + _ranks(record["training"]),
        samples=_samples(record),
        merge=_merge(record["merge"]),
        data=_data(record["data"]),
        stages=_stages(record["stages"]),
        settings=_settings(config),
        environment=_environment(record),
    )


@cache
def _template() -> Template:
    text = files("qlora_kit.train").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text)


def _tiles(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers worth seeing first."""
    training, model, memory = record["training"], record["model"], record["memory"]
    tiles = []
    before = {result["name"]: result for result in record["before"]}
    for result in record["after"][:2]:
        rows = metric_rows(result_from_dict(result))
        name, value = rows[0]
        old = before.get(result["name"])
        was = dict(metric_rows(result_from_dict(old))).get(name, "") if old else ""
        tiles.append({"name": f"{result['name']}: {name}", "value": value, "was": was})
    tiles.append(
        {
            "name": "training",
            "value": duration(training["seconds"]),
            "was": f"{training['tokens_per_s']:,.0f} tokens/s",
        }
    )
    share = model["trainable"] / max(1, model["parameters"])
    tiles.append(
        {"name": "trained", "value": count(model["trainable"]), "was": f"{share:.2%} of the model"}
    )
    if "gpu_peak_bytes" in memory:
        peak, kind = memory["gpu_peak_bytes"], "GPU, allocated"
        if record.get("plan"):
            kind += f"; {record['plan']['predicted_gib']:.2f} GiB predicted for training"
    else:
        peak, kind = memory["host_peak_bytes"], "host"
    tiles.append({"name": "peak memory", "value": format_bytes(peak), "was": kind})
    return tiles


def _sets(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per held-out set: measure, before, after, change."""
    before = {result["name"]: result_from_dict(result) for result in record["before"]}
    tables = []
    for values in record["after"]:
        after = result_from_dict(values)
        old = before.get(after.name)
        was = dict(metric_rows(old)) if old else {}
        numbers = {"loss": after.loss, "perplexity": after.perplexity, **_named(after.scores)}
        olds = {"loss": old.loss, "perplexity": old.perplexity, **_named(old.scores)} if old else {}
        rows = []
        for name, value in metric_rows(after):
            change, good = _change(name, olds.get(name), numbers[name])
            rows.append(
                {
                    "name": name,
                    "before": was.get(name, "–"),
                    "after": value,
                    "change": change,
                    "good": good,
                }
            )
        tables.append({"name": after.name, "task": after.task, "rows_n": after.rows, "rows": rows})
    return tables


def _named(scores: Mapping[str, float]) -> dict[str, float]:
    return {name.replace("_", " "): value for name, value in scores.items()}


def _change(name: str, before: float | None, after: float | None) -> tuple[str, str]:
    if before is None or after is None:
        return "", ""
    difference = after - before
    if abs(difference) < 5e-5:
        return "±0", ""
    good = (difference < 0) == (name in _BETTER_BELOW)
    if name == "perplexity":
        text = f"÷ {before / after:,.1f}" if after < before else f"× {after / before:,.1f}"
    elif name == "loss":
        text = f"{difference:+.4f}"
    else:
        text = f"{100 * difference:+.1f} points"
    return text.replace("-", "−"), "good" if good else "bad"


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]


def _charts(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss, learning rate, speed, gradient norm: those that were logged."""
    loss = _points(history, "loss")
    lines = [Series(name="training", points=loss)]
    if len(loss) > _SMOOTH_ABOVE:
        lines = [
            Series(name="raw", points=loss, kind="faint"),
            Series(name="training", points=smooth(loss, len(loss) // 12 | 1)),
        ]
    held_out = sorted({key for entry in history for key in entry if key.startswith("eval")})
    for i, key in enumerate(held_out):
        name = key.removeprefix("eval_").removesuffix("loss").strip("_") or "held out"
        points = _points(history, key)
        lines.append(Series(name=name, points=points, kind="dots", color=2 + i % 2))
    charts = [_chart("Loss", "nats per token", lines)]
    for title, unit, key, from_zero in (
        ("Learning rate", "", "learning_rate", True),
        ("Speed", "tokens per second", "tokens_per_s", True),
        ("Gradient norm", "before clipping", "grad_norm", True),
        ("Regularizer", "part of the training loss", "penalty", True),
    ):
        # The first line includes one-time work: it would set the scale of the speed chart.
        points = _points(history, key)
        points = points[1:] if key == "tokens_per_s" and len(points) > 2 else points
        charts.append(_chart(title, unit, [Series(name=title, points=points)], from_zero))
    return [chart for chart in charts if chart["svg"]]


def _ranks(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """AdaLoRA's ranks over time; nothing for other methods."""
    history = training.get("ranks")
    if not history:
        return []
    svg = rank_map(history, training["updates"], title="Rank of every matrix")
    unit = f"of {history['budget'][0]:,} at the start, {history['budget'][-1]:,} at the end"
    return [{"title": "Rank of every matrix", "unit": unit, "svg": svg, "legend": []}]


def _chart(title: str, unit: str, lines: list[Series], from_zero: bool = False) -> dict[str, Any]:
    legend = [
        {"name": line.name, "color": line.color, "kind": line.kind} for line in lines if line.points
    ]
    svg: Markup = line_chart(lines, title=title, x_label="update", from_zero=from_zero)
    return {
        "title": title,
        "unit": unit,
        "svg": svg,
        "legend": legend if len(legend) > 1 else [],
    }


def _samples(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    before = {result["name"]: result["answers"] for result in record["before"]}
    tables = []
    for result in record["after"]:
        olds = before.get(result["name"], [])
        rows = [
            answer | {"before": olds[i] if i < len(olds) else None}
            for i, answer in enumerate(result["answers"])
        ]
        if rows:
            tables.append({"name": result["name"], "rows": rows, "has_before": bool(olds)})
    return tables


def _merge(merge: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if merge is None:
        return None
    deviation = merge["deviation"]
    verdict = ""
    if deviation:
        kl = deviation["kl"]
        verdict = (
            "The merged model predicts as the trained one does."
            if kl < 2e-3
            else "The merged model differs slightly from the trained one."
            if kl < 5e-2
            else "The merged model differs clearly from the trained one: measure it before use."
        )
    return {**merge, "size": format_bytes(merge["nbytes"]), "verdict": verdict}


def _data(data: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, **report} for name, report in data.items()]


def _stages(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    longest = max((stage["seconds"] for stage in stages), default=1.0) or 1.0
    rows = []
    for stage in stages:
        memory = stage.get("gpu_peak_bytes", stage["host_bytes"])
        rows.append(
            {
                "name": stage["name"],
                "time": duration(stage["seconds"]),
                "share": round(100 * stage["seconds"] / longest, 1),
                "memory": format_bytes(memory),
            }
        )
    return rows


def _settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every field of the run, part by part; those that differ from the default are marked."""
    parts = {
        "model": ModelConfig,
        "data": DataConfig,
        "train": TrainConfig,
        "eval": EvalConfig,
        "export": ExportConfig,
    }
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    tables = [{"name": "run", "rows": _fields(plain, _defaults(RunConfig))}]
    for key, value in config.items():
        if isinstance(value, Mapping):
            known = parts.get(key) or type(_defaults(RunConfig)[key])
            tables.append({"name": key, "rows": _fields(value, _defaults(known))})
    return tables


def _defaults(kind: type) -> dict[str, Any]:
    """Default values of a dataclass; fields without one are left out."""
    if not is_dataclass(kind):
        return {}
    found: dict[str, Any] = {}
    for field in fields(kind):
        if callable(field.default_factory):
            found[field.name] = field.default_factory()
        elif field.default.__class__.__name__ != "_MISSING_TYPE":
            found[field.name] = field.default
    return found


def _fields(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, value in values.items():
        default = defaults.get(name)
        same = name in defaults and _plain(value) == _plain(default)
        rows.append({"name": name, "value": _show(value), "changed": not same})
    return rows


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {entry}" for key, entry in value.items()) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _environment(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = record["environment"]
    model = record["model"]
    size = f"{count(model['parameters'])} parameters, base held in"
    kind = f"{model['class']}, {size} {format_bytes(model['base_bytes'])}"
    cores = f"{found['cpu_count']} logical cores, {found['threads']} threads"
    rows = [
        ("model", f"{kind}, computing in {model['dtype']}"),
        ("device", found.get("gpu", found["device"])),
        ("processor", f"{cores}, {format_bytes(found['host_memory_bytes'])}"),
        ("system", f"{found['platform']}, Python {found['python']}"),
        ("packages", ", ".join(f"{name} {number}" for name, number in found["versions"].items())),
    ]
    if found.get("commit"):
        rows.append(("commit", found["commit"]))
    if found.get("command"):
        rows.append(("command", found["command"]))
    return rows
