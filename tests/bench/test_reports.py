"""Markdown and HTML from one record: complete, escaped, self-contained."""

import re
from itertools import pairwise

import pytest

from qlora_kit.bench.bars import Bar, bar_chart
from qlora_kit.bench.html import render_html
from qlora_kit.bench.markdown import render_markdown
from qlora_kit.bench.methods import ALL, title_of
from qlora_kit.bench.predicted import add_predictions
from qlora_kit.bench.tables import tables_of
from tests.bench.rows import record_of, row_of

PREDICTED = {"weights": 0.5, "embeddings": 0.5, "trained": 0.1, "step": 0.38}


def sample():
    return record_of(
        row_of("full"),
        row_of("qlora", predicted_gib=1.48, predicted_components_gib=PREDICTED),
        row_of("lora", graph=True, graphs=True, peak_reserved_gib=9.0),
        {k: v for k, v in row_of("full", policy="save", oom=True).items() if k != "tokens_per_s"},
    )


def test_a_table_has_every_row_and_no_empty_column():
    (table,) = tables_of(sample())
    assert [cells[0] for cells in table.rows] == [
        "full, mixed precision",
        "full, mixed precision",
        "LoRA, 16-bit base",
        "QLoRA",
    ]
    for column in zip(*table.rows, strict=True):
        assert any(cell not in ("", "–") for cell in column)
    assert "host GiB" not in table.header
    by_name = {cells[0]: dict(zip(table.header, cells, strict=True)) for cells in table.rows}
    assert by_name["QLoRA"]["full /"] == "13.33"
    assert by_name["QLoRA"]["off"] == "-1.3%"
    assert by_name["LoRA, 16-bit base"]["full /"] == "2.22"  # what its graph reserves counts


@pytest.mark.parametrize("render", [render_markdown, render_html])
def test_reports_say_what_was_measured_on_what(render):
    text = render(sample())
    for word in ("H100", "580.1", "abc1234", "qlora-kit bench memory", "2.11.0", "out of memory"):
        assert word in text
    assert "QLoRA needs at most 1/8" in text


def test_the_page_loads_nothing_and_escapes():
    record = sample() | {"command": "<script>alert(1)</script>", "note": "<b>no GPU</b>"}
    page = render_html(record)
    assert "<script" not in page
    assert "<b>no GPU" not in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", page)
    assert "default-src 'none'" in page


def test_memory_is_drawn_by_component_with_the_prediction_beside():
    page = render_html(sample())
    for part in ("weights", "embeddings", "trained", "gradients", "optimizer", "step", "reserved"):
        assert f"<title>{part}: " in page
    assert "<title>predicted step: 0.38</title>" in page
    assert page.count('class="chart"') == 3  # memory, speed, losses


def curves(page):
    """Of the chart of losses: the style of each line, and its points' heights on the page."""
    chart = page[page.index("<h3>Loss</h3>") :].split("</figure>")[0]
    found = re.findall(r'<polyline class="line (c\d) (\w+)" points="([^"]+)"', chart)
    heights = [[float(p.split(",")[1]) for p in points.split()] for *_, points in found]
    return [(color, kind) for color, kind, _ in found], heights, chart


def test_losses_are_those_of_the_rows():
    """One curve a method, of its first row, lower where the loss is; none of so few steps."""
    rows = [
        row_of("full", losses=[9.0, 8.0, 7.0, 6.0]),
        row_of("qlora", losses=[9.0, 8.5, 8.0, 7.5]),
        row_of("qlora", policy="save", losses=[1.0, 1.0, 1.0, 1.0]),
        row_of("lora", losses=[5.0, 4.0]),
    ]
    styles, (full, qlora), chart = curves(render_html(record_of(*rows)))
    assert len(set(styles)) == len(styles) == 2
    drops = [b - a for a, b in pairwise(full)]
    assert drops == pytest.approx([drops[0]] * 3, abs=0.2)
    assert drops[0] > 0  # the page's y points down
    assert full[0] == qlora[0]
    assert qlora[-1] - qlora[0] == pytest.approx((full[-1] - full[0]) / 2, abs=0.2)
    names = re.findall(r'<i class="l\d \w+"></i>([^<]+)<', chart)
    assert names == ["full, mixed precision", "QLoRA"]
    _, (moved, _), _ = curves(render_html(record_of(rows[0] | {"losses": [9, 6, 7, 8]}, rows[1])))
    assert moved != full


def test_no_two_curves_look_alike():
    rows = [row_of(name) for name in ALL]
    page = render_html(record_of(*rows))
    styles, _, chart = curves(page)
    assert len(set(styles)) == len(styles) == len({title_of(row) for row in rows}) > 8
    marks = re.findall(r'<i class="l(\d) (\w+)"></i>', chart)
    assert [(f"c{color}", kind) for color, kind in marks] == styles
    for color, _ in styles:
        assert f".line.{color} " in page
        assert f"--{color}: " in page


def test_bars_are_as_long_as_their_parts():
    svg = bar_chart(
        [Bar(name="a", parts={"x": 1.0, "y": 3.0}), Bar(name="b", parts={"x": 2.0})],
        {"x": 1, "y": 2},
        title="t",
        unit="u",
    )
    widths = [float(w) for w in re.findall(r'<rect[^>]*? width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.3)
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.3)
    assert ">4.00<" in svg


def test_without_a_gpu_nothing_is_predicted():
    record = sample() | {"gpu": None}
    add_predictions(record)
    assert all(row["predicted_gib"] is None for row in record["rows"])


def test_predictions_come_from_the_planner():
    """Ours and full with our loss; never a peer or the stock loss."""
    pytest.importorskip("qlora_kit.plan.predict")
    record = record_of(row_of("qlora"), row_of("full", head="stock"), row_of("peft"))
    for row in record["rows"]:
        row["model"], row["step"] = "tiny", "fused"
    add_predictions(record)
    ours, stock, peer = record["rows"]
    assert ours["predicted_gib"] > 0
    assert sum(ours["predicted_components_gib"].values()) == pytest.approx(ours["predicted_gib"])
    assert stock["predicted_gib"] is None
    assert peer["predicted_gib"] is None
