"""What the model will see, token by token, and which tokens count.

    Example 1 of 960: 62 tokens, 2 in the loss
      .    <|im_start|>|user|\\n|Is| the| sentiment|...
      LOSS positive|<|im_end|>
      .    \\n

Tokens are separated by `|`; control characters are written as escapes. Every line
says whether its tokens count, so the text loses nothing without colour; with
colour, tokens that count are green and the others dim.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.text import Text

from qlora_kit.train.data.collate import padding_share
from qlora_kit.train.data.tokenize import IGNORED
from qlora_kit.train.data.tokenized import DataReport, Row, TokenizedSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GUTTER = {True: "  LOSS ", False: "  .    "}
_STYLE = {True: "bold green", False: "dim"}


def render_preview(
    dataset: TokenizedSet,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    rows: int = 3,
    width: int = 80,
    batch_size: int = 8,
) -> str:
    """Write the first rows and the counts of a data set as plain text.

    Args:
        dataset: as `build_dataset` makes it.
        tokenizer: the one it was made with.
        rows: how many rows to show.
        width: longest line.
        batch_size: rows per batch, for the share of padding.

    Returns:
        Lines of text, without colour, ending in a line break.

    Example:
        >>> class Letters:  # a tokenizer in miniature
        ...     def decode(self, ids):
        ...         return "".join(map(chr, ids))
        >>> report = DataReport(**dict.fromkeys(DataReport.__dataclass_fields__, 0))
        >>> dataset = TokenizedSet([{"input_ids": [72, 105, 10], "labels": [-100, 105, 10]}],
        ...     report=report, task="causal_lm", packed=False, pad_token_id=0)
        >>> print(render_preview(dataset, Letters()).partition("\\n\\n")[0])
        Row 1 of 1: 3 tokens, 2 in the loss
          .    H
          LOSS i|\\n
    """
    return "".join(
        line.plain + "\n" for line in _lines(dataset, tokenizer, rows, width, batch_size)
    )


def print_preview(
    dataset: TokenizedSet,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    rows: int = 3,
    batch_size: int = 8,
    file: TextIO | None = None,
) -> None:
    """Print what `render_preview` writes, in colour where the terminal shows it.

    Args:
        dataset: as `build_dataset` makes it.
        tokenizer: the one it was made with.
        rows: how many rows to show.
        batch_size: rows per batch, for the share of padding.
        file: standard output when None.

    Example:
        >>> import io
        >>> report = DataReport(**dict.fromkeys(DataReport.__dataclass_fields__, 0))
        >>> dataset = TokenizedSet([], report=report, task="causal_lm", packed=False,
        ...     pad_token_id=0)
        >>> page = io.StringIO()
        >>> print_preview(dataset, None, file=page)
        >>> page.getvalue().startswith("source")
        True
    """
    console = Console(file=file or sys.stdout, highlight=False)
    width = min(console.width, 100) if console.is_terminal else 80
    for line in _lines(dataset, tokenizer, rows, width, batch_size):
        if console.is_terminal:
            console.print(line, no_wrap=True, crop=False, overflow="ignore", soft_wrap=True)
        else:
            console.file.write(line.plain + "\n")


def describe(report: DataReport) -> list[tuple[str, str]]:
    """Put a data report into words.

    Args:
        report: of any set.

    Returns:
        (name, value) pairs for a table; what did not happen is left out.

    Example:
        >>> report = DataReport(**dict.fromkeys(DataReport.__dataclass_fields__, 0))
        >>> describe(report)[2]
        ('rows', '0')
    """
    pairs = [
        ("source", str(report.source)),
        ("format", f"{report.format}, chat template: {report.template}"),
        ("rows", f"{report.rows:,}"),
        ("examples", f"{report.examples:,}"),
    ]
    if report.packed_rows != report.examples:
        filled = report.tokens / (report.packed_rows * report.max_length)
        pairs.append(("packed into", f"{report.packed_rows:,} rows, {filled:.1%} filled"))
    share = report.loss_tokens / report.tokens if report.tokens else 0.0
    pairs += [
        ("tokens", f"{report.tokens:,}"),
        ("loss tokens", f"{report.loss_tokens:,} ({share:.1%})"),
        ("longest", f"{report.longest:,} of at most {report.max_length:,} tokens"),
        ("truncated", f"{report.truncated:,} examples, {report.tokens_lost:,} tokens lost"),
    ]
    if report.dropped:
        pairs.append(("dropped", f"{report.dropped:,} examples with nothing left to learn"))
    return pairs


def _lines(
    dataset: TokenizedSet,
    tokenizer: "PreTrainedTokenizerBase",
    rows: int,
    width: int,
    batch_size: int,
) -> Iterator[Text]:
    for index in range(min(rows, len(dataset))):
        yield from _row_lines(dataset, tokenizer, index, width)
        yield Text("")
    pairs = describe(dataset.report)
    plain = padding_share(dataset.lengths, batch_size, grouped=False)
    grouped = padding_share(dataset.lengths, batch_size, grouped=True)
    pairs.append(
        (f"padding (batch {batch_size})", f"{plain:.1%}; grouped by length: {grouped:.1%}")
    )
    name_width = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        yield Text.assemble((f"{name:{name_width}}", "bold"), value)


def _row_lines(
    dataset: TokenizedSet, tokenizer: "PreTrainedTokenizerBase", index: int, width: int
) -> Iterator[Text]:
    row = dataset[index]
    ids: list[int] = row["input_ids"]
    head = f"Row {index + 1} of {len(dataset)}: {len(ids)} tokens"
    if dataset.task == "sequence_classification":
        yield Text(f"{head}, class {dataset.label_names[row['labels']]!r}", style="bold")
        yield from _wrapped([_visible(tokenizer, one) for one in ids], False, width)
        return
    counted = sum(label != IGNORED for label in row["labels"])
    documents = list(_documents(row))
    packed = f", {len(documents)} documents" if len(documents) > 1 else ""
    yield Text(f"{head}, {counted} in the loss{packed}", style="bold")
    for number, (start, end) in enumerate(documents, 1):
        if packed:
            yield Text(f"  document {number}", style="italic")
        for in_loss, places in groupby(
            range(start, end), key=lambda i: row["labels"][i] != IGNORED
        ):
            shown = [_visible(tokenizer, ids[i]) for i in places]
            yield from _wrapped(shown, in_loss, width)


def _documents(row: Row) -> Iterator[tuple[int, int]]:
    """Bounds of the documents of a row: one, unless it is packed."""
    positions = row.get("position_ids", [0])
    starts = [i for i, position in enumerate(positions) if position == 0]
    return zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)


def _visible(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """One token as text; control characters and a lone `|` told apart."""
    text = str(tokenizer.decode([token]))
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped or f"<{token}>"


def _wrapped(tokens: Sequence[str], in_loss: bool, width: int) -> Iterator[Text]:
    """Lines of at most `width` columns; a token longer than a line is broken."""
    room = width - len(_GUTTER[in_loss])
    line = ""
    for number, token in enumerate(tokens):
        piece = token + ("|" if number + 1 < len(tokens) else "")
        if line and len(line) + len(piece) > room:
            yield _styled(line, in_loss)
            line = ""
        while len(piece) > room:
            yield _styled(piece[:room], in_loss)
            piece = piece[room:]
        line += piece
    if line:
        yield _styled(line, in_loss)


def _styled(text: str, in_loss: bool) -> Text:
    return Text.assemble((_GUTTER[in_loss], "dim"), (text, _STYLE[in_loss]))
