"""Every layout becomes the same typed examples; malformed rows are named."""

import json

import pytest

from qlora_kit.core.errors import DataError
from qlora_kit.train.data.formats import Conversation, Labelled, Message, Text, detect, to_examples
from qlora_kit.train.data.sources import Rows

HELLO = Conversation((Message("user", "hello"), Message("assistant", "hi")))
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]


def rows(*data, **fields):
    return Rows(source="data.jsonl", data=list(data), **fields)


@pytest.mark.parametrize(
    ("row", "layout", "example"),
    [
        ({"prompt": "hello", "completion": "hi"}, "prompt_completion", HELLO),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion", HELLO),
        ({"messages": CHAT}, "messages", HELLO),
        ({"messages": json.dumps(CHAT)}, "messages", HELLO),  # a CSV cell
        ({"messages": CHAT, "prompt": "hello", "prompt_id": 3}, "messages", HELLO),
        ({"conversations": SHAREGPT}, "sharegpt", HELLO),
        ({"conversations": CHAT}, "sharegpt", HELLO),
        ({"instruction": "hello", "input": "", "output": "hi"}, "alpaca", HELLO),
        ({"instruction": "hello", "input": None, "output": "hi"}, "alpaca", HELLO),
        ({"text": "hello"}, "text", Text("hello")),
    ],
)
def test_layouts(row, layout, example):
    assert to_examples(rows(row)) == ([example], layout)


def test_alpaca_input_is_a_paragraph_of_the_question():
    row = {"instruction": "Translate.", "input": "hallo", "output": "hello"}
    (example,), _ = to_examples(rows(row))
    assert example.messages[0].content == "Translate.\n\nhallo"


def test_classification_keeps_the_label_as_it_is():
    data = rows({"text": "a", "label": "x"}, {"text": "b", "label": 1})
    examples, layout = to_examples(data, task="sequence_classification")
    assert (examples, layout) == ([Labelled("a", "x"), Labelled("b", 1)], "classification")


def test_unknown_columns_list_themselves_and_the_layouts():
    with pytest.raises(DataError) as caught:
        detect(["question", "answer"], source="qa.csv")
    for word in ("qa.csv", "question, answer", "prompt_completion: prompt, completion", "columns"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": None}, r"line 4: column 'completion' .* missing"),
        ({"prompt": "a", "completion": 3}, r"line 4: column 'completion' .* a int"),
        ({"messages": []}, r"line 4: .* at least one message"),
        ({"messages": "[oops"}, r"line 4: .* not valid JSON"),
        ({"messages": ["hello"]}, r"line 4: message 1 .* object with a role"),
        ({"messages": [{"role": "user"}]}, r"line 4: message 1 .* content a NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content a list"),
        (
            {"messages": [*CHAT, {"role": "assistant", "tool_calls": [1]}]},
            r"message 3 .*tool_calls",
        ),
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"from 'robot'; known speakers"),
        ({"text": 5}, r"line 4: column 'text'"),
    ],
)
def test_malformed_rows_are_named(row, message):
    with pytest.raises(DataError, match=message):
        to_examples(rows(row, unit="line", numbers=[4]))


def test_layout_and_task_have_to_agree():
    labelled, chat = rows({"text": "a", "label": 1}), rows({"messages": CHAT})
    with pytest.raises(DataError, match=r"model\.task: sequence_classification"):
        to_examples(labelled)
    assert to_examples(labelled, "text")[0] == [Text("a")]  # as asked
    with pytest.raises(DataError, match=r"does not suit model\.task: sequence_classification"):
        to_examples(chat, task="sequence_classification")
    with pytest.raises(DataError, match="lacks the column 'text'"):
        to_examples(chat, "text")
    with pytest.raises(DataError, match=r"has to be a name or a whole number; it is 0\.5"):
        to_examples(rows({"text": "a", "label": 0.5}), task="sequence_classification")
