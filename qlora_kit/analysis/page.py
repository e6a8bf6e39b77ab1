"""The page of an inspection: one HTML file that needs nothing else, made from the record alone.

Heat maps of φ beside their random control, φ over layers and modules, spectra as lines,
and the tables. Paths are untrusted text: everything is escaped, and the page forbids
itself to load anything or to run scripts.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from qlora_kit.analysis.heat import Panel, heat_maps
from qlora_kit.analysis.tables import by_kind, tables_of
from qlora_kit.train.charts import Series, line_chart

_LAYER_RANK = 8
"""Most directions compared in the map over layers."""


def render_page(record: dict[str, Any]) -> str:
    """Make the page.

    Args:
        record: of `inspect_adapters`.

    Returns:
        A complete HTML document without references to anything outside.

    Example:
        >>> page = render_page({"adapters": [], "similarity": [], "versions": {}})
        >>> page.startswith("<!doctype html>")
        True
    """
    return _template().render(
        adapters=[
            {"path": adapter["path"], "spectra": spectra(adapter)} for adapter in record["adapters"]
        ],
        pairs=[
            {"first": pair["first"], "second": pair["second"], "figures": figures(pair)}
            for pair in record["similarity"]
        ],
        tables=tables_of(record),
        versions=record["versions"],
    )


@cache
def _template() -> Template:
    text = files("qlora_kit.analysis").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text)


def figures(pair: dict[str, Any]) -> list[Markup]:
    """Draw the maps of one pair of adapters.

    Args:
        pair: an entry of the record's `similarity`.

    Returns:
        Per side: φ with its control below each other, and φ over layers.

    Example:
        >>> figures({"means": [], "modules": []})
        []
    """
    drawn = []
    for side in dict.fromkeys(entry["side"] for entry in pair["means"]):
        means = [entry for entry in pair["means"] if entry["side"] == side]
        drawn += [phi_figure(means, side), _over_layers(pair, side)]
    return [svg for svg in drawn if svg]


def phi_figure(means: list[dict[str, Any]], side: str) -> Markup:
    """Draw φ(i, j) per kind of module, and its random control, on one scale.

    Args:
        means: entries of one side, of a pair's `means`.
        side: for the title.

    Returns:
        An SVG that stands alone.

    Example:
        >>> entry = {"kind": "q", "layers": 2, "phi": [[1.0]], "random": [[0.1]]}
        >>> "random" in phi_figure([entry], "A")
        True
    """
    last = {entry["kind"]: entry["kind"].rpartition(".")[2] for entry in means}
    short = last if len(set(last.values())) == len(last) else {kind: kind for kind in last}
    panels = []
    for entry in means:
        panels.append(Panel(title=short[entry["kind"]], values=entry["phi"]))
        panels.append(Panel(title="random", values=entry["random"]))
    return heat_maps(
        panels,
        title=f"φ(i, j), side {side}, mean over layers",
        x_label="j, directions of the second",
        y_label="i, directions of the first",
        top=1.0,
    )


def _over_layers(pair: dict[str, Any], side: str) -> Markup:
    """φ(k, k) with a row per kind of module and a column per layer."""
    lines = [line for line in pair["modules"] if line["side"] == side and line["i"] and line["j"]]
    layers = sorted({line["layer"] for line in lines if line["layer"] is not None})
    if len(layers) < 2:
        return Markup("")
    k = max(n for n in lines[0]["i"] if n <= _LAYER_RANK and all(n in line["j"] for line in lines))
    kinds = by_kind(lines)
    values = [[_at(group, layer, k) for layer in layers] for group in kinds.values()]
    step = max(1, len(layers) // 16)
    return heat_maps(
        [
            Panel(
                title="",
                values=values,
                rows=list(kinds),
                columns=[str(n) if at % step == 0 else "" for at, n in enumerate(layers)],
            )
        ],
        title=f"φ({k}, {k}), side {side}, every layer",
        x_label="layer",
        y_label="",
        top=1.0,
        width=560,
        height=22 * len(kinds),
    )


def _at(group: list[dict[str, Any]], layer: int, k: int) -> float | None:
    for line in group:
        if line["layer"] == layer and k in line["i"] and k in line["j"]:
            return float(line["phi"][line["i"].index(k)][line["j"].index(k)])
    return None


def spectra(adapter: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw σ of ΔW, a chart per kind of module and a line per layer.

    Args:
        adapter: an entry of the record's `adapters`.

    Returns:
        Titles and SVGs, styled by the page.

    Example:
        >>> spectra({"modules": []})
        []
    """
    drawn = []
    for kind, lines in by_kind(adapter["modules"]).items():
        series = [
            Series(
                name=line["module"],
                points=[(float(n), value) for n, value in enumerate(line["values"], start=1)],
                kind="faint",
            )
            for line in lines
        ]
        middle = _mean_values(lines)
        series.append(Series(name="mean", points=middle, color=2))
        svg = line_chart(
            series, title=f"spectrum of {kind}", x_label="singular value", from_zero=True
        )
        if svg:
            drawn.append({"title": kind, "svg": svg})
    return drawn


def _mean_values(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Mean spectrum over layers; a value that a layer lacks counts as zero."""
    longest = max(len(line["values"]) for line in lines)
    sums = [
        sum(line["values"][n] for line in lines if n < len(line["values"])) for n in range(longest)
    ]
    return [(float(n + 1), total / len(lines)) for n, total in enumerate(sums)]
