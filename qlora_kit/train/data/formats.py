"""From rows of any layout to typed examples.

Layouts (docs/data.md shows each): prompt/completion, chat `messages`, ShareGPT
`conversations`, Alpaca, raw `text`, and `text` + `label` for classification. The
first four all mean a conversation, so they become one: prompt/completion and
Alpaca rows are a user message and the assistant's answer. That way every model
sees its own chat template and nothing downstream has to know the layout.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.core.errors import DataError
from qlora_kit.train.config import DataFormat, Task
from qlora_kit.train.data.sources import Rows


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant`, or another role the chat template knows."""
    content: str
    """The text of the turn."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat; its assistant turns can be learnt."""

    messages: tuple[Message, ...]
    """The turns in order, at least one."""


@dataclass(frozen=True, slots=True)
class Text:
    """A raw document; all of it is learnt."""

    text: str
    """The document."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class."""

    text: str
    """What is classified."""
    label: str | int
    """Name or number of the class, as the row has it."""


Example = Conversation | Text | Labelled

REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "classification": ("text", "label"),
    "text": ("text",),
}
"""Columns that tell a layout, in the order `detect` tries them."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Speakers of ShareGPT files and the chat roles they mean."""


def detect(columns: Sequence[str], *, source: str = "the data") -> DataFormat:
    """Tell the layout by its column names.

    Args:
        columns: names present. Further columns than the layout's are ignored.
        source: name of the file, for the message.

    Returns:
        A layout; the first that fits in the order of `REQUIRED`.

    Raises:
        DataError: none fits; the message lists the columns and the layouts.

    Example:
        >>> detect(["id", "prompt", "completion"])
        'prompt_completion'
    """
    for name, needed in REQUIRED.items():
        if set(needed) <= set(columns):
            return name  # type: ignore[return-value]  # the keys are the Literal's values
    layouts = "\n".join(f"  {name}: {', '.join(needed)}" for name, needed in REQUIRED.items())
    raise DataError(
        f"Cannot tell the layout of {source} by its columns: {', '.join(columns)}.\n"
        f"Known layouts and the columns they need:\n{layouts}\n"
        f"Rename columns with data.columns, for example {{question: prompt, answer: completion}}."
    )


def to_examples(
    rows: Rows, layout: DataFormat = "auto", *, task: Task = "causal_lm"
) -> tuple[list[Example], DataFormat]:
    """Turn every row into a typed example.

    Args:
        rows: as `load_rows` gives them, columns already renamed.
        layout: how rows are laid out; `auto` decides by their columns.
        task: classification needs `text` and `label`; text generation anything else.

    Returns:
        One example per row, in order, and the layout that was used.

    Raises:
        DataError: the layout does not fit the columns or the task, or a row is
            malformed; names the row.

    Example:
        >>> rows = Rows(source="x", data=[{"prompt": "2+2?", "completion": "4"}])
        >>> examples, layout = to_examples(rows)
        >>> layout, examples[0].messages[1]
        ('prompt_completion', Message(role='assistant', content='4'))
    """
    columns = rows.columns()
    if layout == "auto":
        layout = detect(columns, source=rows.source)
        if layout == "classification" and task == "causal_lm":
            raise DataError(
                f"{rows.source} has the columns of a classification (text, label), but the task "
                f"is text generation. Set model.task: sequence_classification for an encoder; or "
                f"data.format: text to learn the texts; or data.columns: {{text: prompt, label: "
                f"completion}} to generate the label."
            )
    if (layout == "classification") != (task == "sequence_classification"):
        raise DataError(
            f"{rows.source} is read as {layout!r}, which does not suit model.task: {task}. "
            f"Classification needs the columns text and label (rename with data.columns), text "
            f"generation any other layout."
        )
    missing = [name for name in REQUIRED[layout] if name not in columns]
    if missing:
        raise DataError(
            f"{rows.source} is read as {layout!r} and lacks the column {missing[0]!r}; it has "
            f"{', '.join(columns)}. Rename with data.columns, or set data.format: auto."
        )
    convert = _CONVERTERS[layout]
    return [convert(rows[i], _Place(rows, i)) for i in range(len(rows))], layout


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row stands; the text is made only when an error needs it."""

    rows: Rows
    index: int

    def error(self, text: str) -> DataError:
        return DataError(f"{self.rows.place(self.index)}: {text}")


def _string(row: Mapping[str, Any], column: str, place: _Place) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise place.error(
            f"column {column!r} has to be text; it is "
            f"{'missing' if value is None else f'a {type(value).__name__}'}."
        )
    return value


def _prompt_completion(row: Mapping[str, Any], place: _Place) -> Conversation:
    if isinstance(row.get("prompt"), list):  # both as lists of messages
        turns = _turns(row, "prompt", place) + _turns(row, "completion", place)
        return Conversation(turns)
    prompt = Message("user", _string(row, "prompt", place))
    return Conversation((prompt, Message("assistant", _string(row, "completion", place))))


def _alpaca(row: Mapping[str, Any], place: _Place) -> Conversation:
    question = _string(row, "instruction", place)
    if row.get("input"):
        question += "\n\n" + _string(row, "input", place)
    answer = Message("assistant", _string(row, "output", place))
    return Conversation((Message("user", question), answer))


def _messages(row: Mapping[str, Any], place: _Place) -> Conversation:
    return Conversation(_turns(row, "messages", place))


def _sharegpt(row: Mapping[str, Any], place: _Place) -> Conversation:
    return Conversation(_turns(row, "conversations", place))


def _turns(row: Mapping[str, Any], column: str, place: _Place) -> tuple[Message, ...]:
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):  # a CSV cell
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise place.error(f"column {column!r} is not valid JSON ({error.msg}).") from error
    if not isinstance(value, list) or not value:
        raise place.error(f"column {column!r} has to be a list of at least one message.")
    return tuple(_turn(turn, number, column, place) for number, turn in enumerate(value, 1))


def _turn(turn: Any, number: int, column: str, place: _Place) -> Message:
    if not isinstance(turn, Mapping):
        raise place.error(f"message {number} of {column!r} has to be an object with a role.")
    if turn.get("tool_calls"):
        raise place.error(
            f"message {number} holds tool_calls, which are not supported. Write the call into "
            f"the message's text, or leave the row out."
        )
    speaker, content = turn.get("role"), turn.get("content")
    if speaker is None and "from" in turn:
        speaker, content = turn["from"], turn.get("value")
        if speaker not in ROLES:
            raise place.error(
                f"message {number} is from {speaker!r}; known speakers are {', '.join(ROLES)}."
            )
        speaker = ROLES[speaker]
    if not isinstance(speaker, str) or not isinstance(content, str):
        raise place.error(
            f"message {number} of {column!r} needs text under role and content (or from and "
            f"value); its role is {speaker!r} and its content a {type(content).__name__}."
        )
    return Message(speaker, content)


def _text(row: Mapping[str, Any], place: _Place) -> Text:
    return Text(_string(row, "text", place))


def _classification(row: Mapping[str, Any], place: _Place) -> Labelled:
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise place.error(
            f"column 'label' has to be a name or a whole number; it is {label!r} "
            f"({type(label).__name__})."
        )
    return Labelled(_string(row, "text", place), label)


_CONVERTERS: dict[str, Callable[[Mapping[str, Any], _Place], Example]] = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "text": _text,
    "classification": _classification,
}
