"""docs/data.md shows rows that work, and examples/ only name what can be fetched."""

import json
import re
from pathlib import Path

import pytest

from qlora_kit.train.config import DataConfig
from qlora_kit.train.data.dataset import build_dataset
from qlora_kit.train.data.formats import REQUIRED
from tests.train.data.tokenizers_in_memory import chatml

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "data.md").read_text()
SHOWN = dict(
    re.findall(r"\*\*`(\w+)`\*\*[^`]*(?:`[^`]+`[^`]*)*?```json\n(.*?)```", TEXT, re.DOTALL)
)


def test_every_layout_is_shown():
    assert set(SHOWN) == set(REQUIRED)


@pytest.mark.parametrize("layout", REQUIRED)
def test_the_rows_shown_are_read_as_said(layout, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(SHOWN[layout])
    assert len([json.loads(line) for line in SHOWN[layout].splitlines()]) == 3
    task = "sequence_classification" if layout == "classification" else "causal_lm"
    report = build_dataset(DataConfig(train=str(path)), chatml(), task=task).report
    assert (report.format, report.examples) == (layout, 3)


def test_every_field_of_the_data_section_is_explained():
    for field in DataConfig.__dataclass_fields__:
        assert re.search(rf"`(data\.)?{field}\b|^  {field}:", TEXT, re.MULTILINE), field
