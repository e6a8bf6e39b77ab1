"""Rows from files, folders and the hub, each of which can say where it stands.

Text files (.jsonl, .json, .csv) are read here, line by line, because an error in
row 4,711 of somebody's data has to name line 4,711 and because values must arrive
as they were written: no column types are guessed, "NA" stays "NA". Parquet files,
folders written by `datasets.save_to_disk` and hub ids go through the `datasets`
library, which memory-maps them. A folder of plain files is read by split:
`folder/train.jsonl`, `folder/test.csv`, ...

A local path wins over a hub id of the same name. HF_HUB_OFFLINE=1 keeps every
hub id on this machine (only what is cached is read).
"""

import csv
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import DataError, SourceError

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of one source, with the place each came from."""

    source: str
    """File, folder or hub id, for messages."""
    data: Sequence[Mapping[str, Any]]
    """The rows; a list or a `datasets.Dataset`."""
    unit: str = "row"
    """What `numbers` counts: `line` or `row`."""
    numbers: Sequence[int] | None = None
    """Line or row number of each entry of `data`; None: 1, 2, 3, ..."""
    class_names: tuple[str, ...] = ()
    """Names of an integer `label` column, where the source knows them."""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.data[index]

    def place(self, index: int) -> str:
        """Where entry `index` stands, such as `train.jsonl, line 7`.

        Args:
            index: position in `data`, from 0.

        Returns:
            Text for messages.

        Example:
            >>> Rows(source="a.csv", data=[{}, {}], unit="line", numbers=[2, 3]).place(1)
            'a.csv, line 3'
        """
        number = index + 1 if self.numbers is None else self.numbers[index]
        return f"{self.source}, {self.unit} {number}"

    def columns(self) -> tuple[str, ...]:
        """Column names: of the table, or of the first hundred rows together.

        Returns:
            Names in the order they appear.

        Example:
            >>> Rows(source="x", data=[{"text": "a"}, {"text": "b", "label": 1}]).columns()
            ('text', 'label')
        """
        named = getattr(self.data, "column_names", None)
        if named is not None:
            return tuple(named)
        return tuple(dict.fromkeys(key for i in range(min(100, len(self))) for key in self[i]))

    def select(self, indices: Sequence[int]) -> "Rows":
        """Some of the rows, in the order given; places are kept.

        Args:
            indices: which, from 0.

        Returns:
            A smaller or reordered selection.

        Example:
            >>> Rows(source="x", data=[{"n": 0}, {"n": 1}]).select([1]).place(0)
            'x, row 2'
        """
        numbers = self.numbers if self.numbers is not None else range(1, len(self) + 1)
        select = getattr(self.data, "select", None)
        chosen = select(indices) if select is not None else [self.data[i] for i in indices]
        return replace(self, data=chosen, numbers=[numbers[i] for i in indices])

    def rename(self, columns: Mapping[str, str]) -> "Rows":
        """Give columns the names the formats expect.

        Args:
            columns: present name to wanted name. Not modified.

        Returns:
            The same rows under the new names.

        Raises:
            DataError: a column does not exist, or a wanted name is taken.

        Example:
            >>> Rows(source="x", data=[{"question": "2+2?"}]).rename({"question": "prompt"})[0]
            {'prompt': '2+2?'}
        """
        present = self.columns()
        for old, new in columns.items():
            if old not in present:
                near = difflib.get_close_matches(old, present, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise DataError(
                    f"{self.source} has no column {old!r} to rename: its columns are "
                    f"{', '.join(present)}.{hint} Change data.columns."
                )
            if new in present and new not in columns:
                raise DataError(
                    f"{self.source} already has a column {new!r}, so {old!r} cannot take its "
                    f"name. Rename {new!r} to something else in data.columns as well."
                )
        if not columns:
            return self
        rename = getattr(self.data, "rename_columns", None)
        if rename is not None:
            return replace(self, data=rename(dict(columns)))
        data = [{columns.get(key, key): value for key, value in row.items()} for row in self.data]
        return replace(self, data=data)


def load_rows(source: str, *, split: str = "train") -> Rows:
    """Read rows from a file, a folder or the hub.

    Args:
        source: path of a .jsonl, .json, .csv or .parquet file; a folder written by
            `datasets.save_to_disk` or holding `<split>.jsonl` and the like; or a hub
            id, with the configuration's name after a colon (`openai/gsm8k:main`).
        split: which part of a folder or hub id. A single file has no splits.

    Returns:
        The rows; at least one.

    Raises:
        SourceError: nothing is there, or it cannot be fetched.
        DataError: it is there and cannot be understood; names file and line.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"text": "one"}\\n\\n{"text": "two"}\\n')
        >>> rows = load_rows(str(path))
        >>> len(rows), rows[1], rows.place(1).endswith("rows.jsonl, line 3")
        (2, {'text': 'two'}, True)
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path, source)
    elif path.is_dir():
        rows = _read_folder(path, source, split)
    elif path.suffix in FILE_KINDS or source.startswith((".", "/", "~")):
        raise SourceError(_missing(path, source))
    elif not _HUB_ID.fullmatch(source):
        raise SourceError(
            f"{source!r} is neither a file or folder here nor a hub id (`owner/name` or "
            f"`owner/name:configuration`). Check the path."
        )
    else:
        rows = _read_hub(source, split)
    if not len(rows):
        raise DataError(f"{rows.source} holds no rows. Check the file, or the split {split!r}.")
    return rows


def _missing(path: Path, source: str) -> str:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    if not hint and path.parts and path.parts[0] == "demo":
        hint = " The demo files come with `python scripts/prepare_demo.py`."
    return f"No data at {source} (looked in {path.parent.absolute()}).{hint}"


def _read_file(path: Path, source: str) -> Rows:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if path.suffix == ".parquet":
        return _read_parquet(path, source)
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(
            f"{source}: cannot read {path.suffix or 'a file without an ending'}. "
            f"Rows come from {', '.join(FILE_KINDS)}; convert the file to one of them."
        )
    try:
        return reader(path, source)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} is not UTF-8 text (byte {error.start}: {error.reason}). "
            f"Save it as UTF-8, for example with `iconv -f latin1 -t utf-8`."
        ) from error


def _read_jsonl(path: Path, source: str) -> Rows:
    data: list[dict[str, Any]] = []
    numbers: list[int] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                hint = ""
                if number == 1 and line.lstrip().startswith("["):
                    hint = " A file holding one JSON list has to end in .json."
                raise DataError(
                    f"{source}, line {number}: not valid JSON at column {error.colno} "
                    f"({error.msg}). Each line has to be one JSON object.{hint}"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{source}, line {number}: each line has to be one JSON object such as "
                    f'{{"prompt": ..., "completion": ...}}; this one is a {type(row).__name__}.'
                )
            data.append(row)
            numbers.append(number)
    return Rows(source=source, data=data, unit="line", numbers=numbers)


def _read_json(path: Path, source: str) -> Rows:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = " One object per line? Then the file has to end in .jsonl." if error.pos else ""
        raise DataError(
            f"{source}, line {error.lineno}: not valid JSON at column {error.colno} "
            f"({error.msg}).{hint}"
        ) from error
    if isinstance(content, dict):  # {"data": [...]}, as several tools write it
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise DataError(
            f"{source} has to hold one list of objects, or an object with exactly one such "
            f"list; it holds a {type(content).__name__}."
        )
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{source}, row {number}: every entry of the list has to be an object; this "
                f"one is a {type(row).__name__}."
            )
    return Rows(source=source, data=content)


def _read_csv(path: Path, source: str) -> Rows:
    data: list[dict[str, str]] = []
    numbers: list[int] = []
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header) or "" in header:
                raise DataError(
                    f"{source}, line 1: the first line has to name every column once; it is "
                    f"{', '.join(map(repr, header))}."
                )
            start = reader.line_num + 1
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise DataError(
                        f"{source}, line {start}: {len(fields)} fields where the header names "
                        f"{len(header)} ({', '.join(header)}). Quote texts that hold commas."
                    )
                if fields:
                    data.append(dict(zip(header, fields, strict=True)))
                    numbers.append(start)
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{source}, line {reader.line_num}: {error}. Write the file with a CSV "
                f"library, or use .jsonl."
            ) from error
    return Rows(source=source, data=data, unit="line", numbers=numbers)


def _read_parquet(path: Path, source: str) -> Rows:
    from datasets import Dataset
    from pyarrow import ArrowException  # datasets itself stands on pyarrow
    from pyarrow.parquet import read_table

    try:
        return _from_dataset(Dataset(read_table(path, memory_map=True)), source)
    except (ArrowException, OSError) as error:
        raise DataError(f"{source} is not a readable Parquet file: {error}.") from error


def _read_folder(path: Path, source: str, split: str) -> Rows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from datasets import DatasetDict, load_from_disk

        try:
            content = load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{source} is a damaged `datasets` folder: {error}.") from error
        if not isinstance(content, DatasetDict):
            return _from_dataset(content, source)
        if split not in content:
            raise DataError(_no_split(source, split, tuple(map(str, content))))
        return _from_dataset(content[split], f"{source}[{split}]")
    for kind in FILE_KINDS:
        if (path / f"{split}{kind}").is_file():
            return _read_file(path / f"{split}{kind}", f"{source.rstrip('/')}/{split}{kind}")
    found = tuple(sorted(p.stem for p in path.iterdir() if p.suffix in FILE_KINDS))
    raise DataError(_no_split(source, split, found))


def _no_split(source: str, split: str, found: tuple[str, ...]) -> str:
    if not found:
        return (
            f"The folder {source} holds no data: neither a data set written by "
            f"`datasets.save_to_disk` nor {split}.jsonl, .json, .csv or .parquet."
        )
    return (
        f"{source} has no split {split!r}; it has {', '.join(found)}. "
        f"Set data.train_split or data.eval_split."
    )


def _read_hub(source: str, split: str) -> Rows:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        table = load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"Cannot read split {split!r} of {source!r}: there is no such file or folder here, "
            f"and the hub says: {_first_line(error)} Check the name, the split "
            f"(data.train_split, data.eval_split) and the connection; HF_HUB_OFFLINE=1 reads "
            f"only what is cached; private data sets need `hf auth login`."
        ) from error
    return _from_dataset(table, f"{source}[{split}]")


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _from_dataset(table: Any, source: str) -> Rows:
    label = table.features.get("label")
    names = tuple(getattr(label, "names", None) or ())
    return Rows(source=source, data=table, class_names=names)
