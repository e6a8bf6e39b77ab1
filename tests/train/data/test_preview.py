"""The preview reads in 80 columns, with and without colour."""

import io
import json

import pytest

from qlora_kit.train.config import DataConfig
from qlora_kit.train.data.dataset import build_dataset
from qlora_kit.train.data.preview import print_preview, render_preview
from tests.train.data.tokenizers_in_memory import chatml


def dataset_of(tmp_path, rows, tokenizer, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = fields.pop("task", "causal_lm")
    return build_dataset(DataConfig(train=str(path), **fields), tokenizer, task=task)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": "word " * 30, "completion": "fine"}, {"prompt": "q", "completion": "ü\n"}]
    return dataset_of(tmp_path, rows, chatml())


def test_masked_and_counted_tokens_are_told_apart(pairs):
    text = render_preview(pairs, chatml(), rows=2)
    # the source's path is as long as it is
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("source"))
    assert "  LOSS f|i|n|e|<|im_end|>\n  .    \\n\n" in text
    assert "Row 2 of 2" in text
    in_loss = [line for line in text.splitlines() if line.startswith("  LOSS")]
    assert len(in_loss) == 2
    for word in ("examples", "loss tokens", "truncated", "longest", "padding (batch 8)"):
        assert word in text


def test_plain_text_into_a_file_and_colour_on_a_terminal(pairs, monkeypatch):
    page = io.StringIO()
    print_preview(pairs, chatml(), rows=1, file=page)
    assert page.getvalue() == render_preview(pairs, chatml(), rows=1)
    assert "\x1b" not in page.getvalue()

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    screen = Terminal()
    print_preview(pairs, chatml(), rows=1, file=screen)
    assert "\x1b[1;32m" in screen.getvalue()  # green where tokens count


def test_packed_rows_show_their_documents(tmp_path):
    rows = [{"prompt": "q", "completion": "a"}] * 2
    text = render_preview(dataset_of(tmp_path, rows, chatml(), packing=True), chatml())
    assert "2 documents" in text
    assert "  document 2\n" in text
    assert "packed into" in text


def test_classes_and_dropped_examples_are_named(tmp_path):
    rows = [{"text": "t", "label": name} for name in ("bad", "good")]
    shown = render_preview(
        dataset_of(tmp_path, rows, chatml(), task="sequence_classification"), chatml()
    )
    assert "class 'bad'" in shown
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "x" * 99, "completion": "a"}]
    cut = dataset_of(tmp_path, rows, chatml(), max_length=64)
    assert "dropped" in render_preview(cut, chatml())


def test_control_characters_stay_on_their_line(tmp_path):
    rows = [{"prompt": "\x1b[31m\t\u2028", "completion": "ok"}]
    text = render_preview(dataset_of(tmp_path, rows, chatml()), chatml())
    assert "\\x1b" in text
    assert "\x1b" not in text
    assert "\u2028" not in text
