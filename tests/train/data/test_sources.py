"""Rows arrive as written, and errors name the file and the line."""

import json
from pathlib import Path

import pytest

from qlora_kit.core.errors import DataError, SourceError
from qlora_kit.train.data.sources import load_rows

ROWS = [{"prompt": "one", "completion": "NA"}, {"prompt": 'tw"o,\n', "completion": "007"}]


def write(path: Path, kind: str) -> Path:
    path = path.with_suffix(f".{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    elif kind == "csv":
        path.write_text('prompt,completion\none,NA\n"tw""o,\n",007\n')
    else:
        from datasets import Dataset

        Dataset.from_list(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path, kind):
    rows = load_rows(str(write(tmp_path / "rows", kind)))
    assert [dict(rows[i]) for i in range(len(rows))] == ROWS
    assert rows.columns() == ("prompt", "completion")


def test_places_count_what_an_editor_counts(tmp_path):
    jsonl, csv = (load_rows(str(write(tmp_path / "rows", kind))) for kind in ("jsonl", "csv"))
    assert jsonl.place(1).endswith("rows.jsonl, line 3")
    assert csv.place(1).endswith("rows.csv, line 3")
    assert csv.select([1]).place(0).endswith("line 3")


def test_datasets_folder_with_and_without_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "two")
    assert len(load_rows(str(tmp_path / "one"))) == 2
    assert load_rows(str(tmp_path / "two"), split="test")[0] == ROWS[1]
    with pytest.raises(DataError, match=r"no split 'validation'; it has train, test"):
        load_rows(str(tmp_path / "two"), split="validation")
    renamed = load_rows(str(tmp_path / "one")).rename({"prompt": "question"}).select([1])
    assert renamed[0]["question"] == ROWS[1]["prompt"]
    assert renamed.place(0).endswith("row 2")


def test_class_names_of_a_datasets_folder(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"text": ["x"], "label": [1]}, features=features).save_to_disk(tmp_path / "d")
    assert load_rows(str(tmp_path / "d")).class_names == ("bad", "good")


def test_folder_of_plain_files_is_read_by_split(tmp_path):
    write(tmp_path / "train", "jsonl")
    write(tmp_path / "test", "csv")
    assert len(load_rows(str(tmp_path), split="test")) == 2
    with pytest.raises(DataError, match=r"no split 'dev'; it has test, train"):
        load_rows(str(tmp_path), split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data"):
        load_rows(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": \n', r"line 2: not valid JSON at column"),
        ("a.jsonl", '[{"text": "ok"}]\n', r"line 1: each line has to be one JSON object"),
        ("a.jsonl", "[\n{}]", r"has to end in \.json"),
        ("a.jsonl", '{"a": 1}\n"b"\n', r"line 2: .* this one is a str"),
        ("a.jsonl", "\n\n", r"holds no rows"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"line 2: not valid JSON .* has to end in \.jsonl"),
        ("a.json", "3", r"holds a int"),
        ("a.json", "[1]", r"row 1: .* this one is a int"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"line 3: 3 fields where the header names 2"),
        ("a.csv", "a,a\n1,2\n", r"line 1: the first line has to name every column once"),
        ("a.csv", 'a,b\n"1,2\n', r"line 2: unexpected end of data"),
        ("a.parquet", "no parquet", r"not a readable Parquet file"),
        ("a.txt", "hello", r"cannot read \.txt"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name))


def test_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\nña\n".encode("latin1"))
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 5"):
        load_rows(str(tmp_path / "a.csv"))


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_text("\ufefftext\nhello\n", encoding="utf-8")
    assert load_rows(str(tmp_path / "a.csv")).columns() == ("text",)


def test_missing_sources_say_what_to_do(tmp_path):
    write(tmp_path / "train", "jsonl")
    with pytest.raises(SourceError, match=r"Did you mean .*train\.jsonl"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(SourceError, match=r"prepare_demo\.py"):
        load_rows("demo/nothing_of_this_name/train.jsonl")
    with pytest.raises(SourceError, match="neither a file or folder here nor a hub id"):
        load_rows("what is this?")
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        load_rows("nobody/no-such-data-set")


def test_rename(tmp_path):
    rows = load_rows(str(write(tmp_path / "rows", "jsonl")))
    assert rows.rename({"prompt": "text"}).columns() == ("text", "completion")
    assert rows.rename({"prompt": "completion", "completion": "prompt"})[0]["prompt"] == "NA"
    with pytest.raises(DataError, match=r"no column 'promt' .* Did you mean 'prompt'"):
        rows.rename({"promt": "text"})
    with pytest.raises(DataError, match="already has a column 'completion'"):
        rows.rename({"prompt": "completion"})
