"""A whole inspection of PEFT's adapters: record, tables and page."""

import json
from html.parser import HTMLParser

import pytest

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.analysis.page import figures, render_page
from qlora_kit.analysis.record import Options, inspect_adapters, powers
from qlora_kit.analysis.tables import tables_of
from qlora_kit.core.errors import AdapterError
from tests import tiny_models
from tests.analysis.helpers import peft_adapter


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Two adapters of PEFT's and an untrained one of ours on a tiny Llama."""
    base, root = tiny_models.saved("llama"), tmp_path_factory.mktemp("adapters")
    for rank, seed in ((4, 1), (9, 2)):
        peft_adapter(base, root / f"r{rank}", rank=rank, seed=seed)
    model = tiny_models.build("llama")
    attach(model, LoRA(rank=2, targets=("q_proj",))).save(root / "fresh", base_model=str(base))
    folders = [root / "r4", root / "r9", root / "fresh"]
    return inspect_adapters(folders, Options(base=str(base), sides=("A", "B", "input")))


def test_record_is_plain_and_complete(record):
    assert json.loads(json.dumps(record)) == record
    assert [len(adapter["modules"]) for adapter in record["adapters"]] == [6, 6, 2]
    assert [adapter["rank"] for adapter in record["adapters"]] == [4, 9, 2]
    assert len(record["similarity"]) == 3
    first = record["similarity"][0]
    assert {entry["kind"] for entry in first["means"]} == {
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
    }
    assert {entry["layers"] for entry in first["means"]} == {2}
    line = first["modules"][0]
    assert (line["i"], line["j"]) == ([1, 2, 4], [1, 2, 4, 8, 9])
    assert line["expected"][2][3] == pytest.approx(8 / line["dimension"], abs=1e-4)


def test_every_line_agrees_with_its_parts(record):
    for adapter in record["adapters"][:2]:
        for spectrum, line in zip(
            sorted(adapter["modules"], key=lambda m: m["module"]),
            sorted(adapter["amplification"], key=lambda m: m["module"]),
            strict=True,
        ):
            assert spectrum["module"] == line["module"]
            assert sum(v * v for v in spectrum["values"]) ** 0.5 == pytest.approx(
                line["delta_norm"], rel=1e-4
            )
            assert line["factor"] == pytest.approx(line["delta_norm"] / line["by_delta"][-1])
            assert line["directions"] == powers(line["rank"])
            assert line["factors"][-1] == line["factor"]
            assert line["factors"][0] == pytest.approx(
                spectrum["values"][0] / line["by_delta"][0], rel=1e-4
            )


def test_an_untrained_adapter_has_no_factor(record):
    fresh = record["adapters"][2]
    assert {line["factor"] for line in fresh["amplification"]} == {None}
    assert {line["norm"] for line in fresh["modules"]} == {0.0}


def test_tables_say_what_the_record_says(record):
    tables = {table.title: table for table in tables_of(record)}
    assert len(tables) == 3 + 2 * 3 + 3
    name = record["adapters"][0]["path"]
    amplification = next(t for title, t in tables.items() if title.startswith(f"{name}: ‖UᵀWV‖"))
    lines = [x for x in record["adapters"][0]["amplification"] if x["kind"] == "mlp.down_proj"]
    row = next(row for row in amplification.rows if row[0] == "mlp.down_proj")
    assert float(row[-1]) == pytest.approx(sum(x["factor"] for x in lines) / 2, rel=5e-3)
    assert amplification.markdown().count("\n") == 4
    factors = tables[f"{name}: factor of the first directions of ΔW, medians over layers"]
    row = next(row for row in factors.rows if row[0] == "mlp.down_proj")
    middle = [sum(x["factors"][n] for x in lines) / 2 for n in range(len(lines[0]["factors"]))]
    assert [float(cell) for cell in row[1:]] == pytest.approx(middle, rel=5e-3)
    assert len({len(line) for line in amplification.markdown().splitlines()[:1]}) == 1


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]


def test_page_needs_nothing_else(record):
    page = _Page()
    page.feed(render_page(record))
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("table") == 3 + 2 * 3 + 3
    # per pair and side φ and its layers; nothing was learned in B of the untrained one
    drawn = sum(len(figures(pair)) for pair in record["similarity"])
    assert drawn == 6 + 2 + 2
    charts = sum(len({m["kind"] for m in a["modules"] if m["values"]}) for a in record["adapters"])
    assert page.tags.count("svg") == drawn + charts


def test_paths_are_escaped(record):
    evil = json.loads(json.dumps(record))
    evil["adapters"][0]["path"] = evil["similarity"][0]["first"] = "<script>alert(1)</script>"
    assert "<script>alert" not in render_page(evil)


def test_an_adapter_without_the_modules_asked_for(tmp_path):
    peft_adapter(tiny_models.saved("llama"), tmp_path / "a", rank=2, seed=0)
    with pytest.raises(AdapterError, match="no module by low rank that matches k_proj"):
        inspect_adapters([tmp_path / "a"], Options(modules=("k_proj",)))
