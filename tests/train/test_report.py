"""The report: self-contained, escaped, complete, and drawn from the record alone."""

import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from qlora_kit.train.charts import Series, line_chart, ticks
from qlora_kit.train.report import render_report, write_report
from tests.train import sample_record

VOID = {"meta", "br", "hr", "img", "input", "link"}


class _Balanced(HTMLParser):
    """Fails on tags that are not closed in order; remembers attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def parse(page: str) -> _Balanced:
    parser = _Balanced()
    parser.feed(page)
    assert parser.stack == []
    return parser


def test_needs_nothing_from_outside(tmp_path: Path) -> None:
    """No scripts, no links, no images, no fonts; and the page forbids them itself."""
    write_report(sample_record.record(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = parse(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form"}
    assert not any(key in attrs for _, attrs in parsed.tags for key in ("src", "href", "onclick"))
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 200_000


def test_shows_every_part(tmp_path: Path) -> None:
    """Results, curves, samples, deviation, data, time, every setting, environment."""
    record = sample_record.record()
    page = render_report(record)
    for text in ("62.4%", "82.8%", "+20.4 points", "−3.2279", "0.00021", "99.2%", "4 min 11 s"):
        assert text in page
    assert page.count("<svg") == 4
    for part, values in record["config"].items():
        for name in values if isinstance(values, dict) else (part,):
            assert f"<td>{name}</td>" in page, name
    assert "1a2b3c4" in page
    assert "runs/quickstart/merged" in page
    assert re.search(r'class="strong">960<', page)  # a changed setting is marked


def test_text_of_models_and_users_is_escaped() -> None:
    """Prompts and answers are data: markup in them is shown, not obeyed."""
    record = sample_record.record()
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    for result in (*record["before"], *record["after"]):
        for answer in result["answers"]:
            answer["prompt"] = answer["answer"] = evil
    record["config"]["output"] = "runs/<b>bold"
    parsed = parse(render_report(record))
    assert not any(tag in ("script", "img", "b") for tag, _ in parsed.tags)


def test_a_bare_run_renders() -> None:
    """Nothing held out, nothing merged, one update: no empty sections, no errors."""
    record = sample_record.record()
    record |= {"before": [], "after": [], "merge": None}
    record["training"]["history"] = [{"step": 1, "loss": 1.5, "learning_rate": 2e-4}]
    record["outputs"]["merged"] = None
    page = render_report(record)
    parse(page)
    assert "Held-out results" not in page
    assert "Merged model" not in page
    assert "Sample answers" not in page
    record["training"]["history"] = []
    assert "<svg" not in render_report(record)


def test_an_unchecked_merge_says_so() -> None:
    """No deviation measured: the reason is on the page."""
    record = sample_record.record()
    record["merge"] |= {"deviation": None, "unchecked": "there are no held-out rows"}
    assert "there are no held-out rows" in render_report(record)


def test_a_bad_merge_is_not_called_good() -> None:
    """The sentence follows the number."""
    record = sample_record.record()
    record["merge"]["deviation"]["kl"] = 0.3
    assert "differs clearly" in render_report(record)


def test_the_page_is_package_data() -> None:
    """The template travels with the package."""
    assert files("qlora_kit.train").joinpath("report.html.j2").is_file()


def test_charts_are_valid_and_finite() -> None:
    """Well-formed SVG whatever the values: constant, negative, one point, NaN, many."""
    cases = [
        [(0.0, 1.0)],
        [(1.0, 2.0), (2.0, 2.0)],
        [(1.0, -2.0), (2.0, float("nan")), (3.0, -5.0)],
        [(float(x), x**0.5) for x in range(5000)],
        [(1.0, 1e-9), (2.0, 3e-9)],
    ]
    for points in cases:
        svg = str(line_chart([Series(name="<&>", points=points)], title="<t>", x_label="x & y"))
        root = ET.fromstring(svg)
        for line in root.iter("polyline"):
            numbers = [float(n) for n in re.split(r"[ ,]", line.attrib["points"])]
            assert len(numbers) <= 1200
            assert all(-1 <= n <= 481 for n in numbers)
    assert (
        str(line_chart([Series(name="a", points=[(1, float("nan"))])], title="", x_label="")) == ""
    )


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (1e-6, 2e-4), (0, 12345), (5, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    """Between 1 and 11 ticks, ascending, within the range."""
    found = ticks(low, high)
    assert 1 <= len(found) <= 11
    assert found == sorted(found)
    assert all(low - 1e-12 <= tick <= high + 1e-9 for tick in found)
