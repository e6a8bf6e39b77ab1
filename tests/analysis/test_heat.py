"""Heat maps: well-formed, right colours in the right places."""

from xml.etree import ElementTree as ET

import pytest

from qlora_kit.analysis.heat import Panel, color, heat_maps

SVG = "{http://www.w3.org/2000/svg}"


def cells(svg: str) -> dict[str, int]:
    """Colour of every path to the number of its pieces."""
    root = ET.fromstring(svg)
    return {p.get("fill"): p.get("d").count("M") for p in root.iter(f"{SVG}path")}


def draw(values, **options):
    return heat_maps(
        [Panel(title="q", values=values)], title="t", x_label="x", y_label="y", **options
    )


def test_colours_run_from_dark_to_light():
    shades = [color(n / 20) for n in range(21)]
    light = [sum(int(shade[n : n + 2], 16) for n in (1, 3, 5)) for shade in shades]
    assert light == sorted(light)
    assert len(set(shades)) == 21


def test_equal_neighbours_are_one_piece():
    found = cells(draw([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert found == {color(0.0): 2, color(1.0): 2}


def test_the_scale_is_common_and_fixed_if_asked():
    assert color(0.5) in cells(draw([[0.5]], top=1.0))
    assert color(1.0) in cells(draw([[0.5]]))


@pytest.mark.parametrize("value", [None, float("nan")])
def test_no_value_is_grey(value):
    assert cells(draw([[value, 1.0]])) == {"#cccccc": 1, color(1.0): 1}


def test_many_panels_many_cells():
    panels = [
        Panel(title=f"<{n}>", values=[[i * j / 4096 for j in range(64)] for i in range(64)])
        for n in range(6)
    ]
    svg = heat_maps(panels, title="φ & more", x_label="j", y_label="i")
    root = ET.fromstring(svg)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"<0>", "<5>", "φ & more", "60"} <= set(texts)
    assert len(svg) < 6 * 40_000
    width, height = map(float, root.get("viewBox").split()[2:])
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width")) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height")) <= height


def test_nothing_to_draw():
    assert draw([[None]]) == ""
