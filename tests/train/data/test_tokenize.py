"""What counts in the loss is told by position, whatever template and tokenizer."""

import pytest

from qlora_kit.core.errors import DataError
from qlora_kit.train.data.formats import Conversation, Message, Text
from qlora_kit.train.data.templates import PLAIN_TEMPLATE, install_template
from qlora_kit.train.data.tokenize import (
    IGNORED,
    ConversationEncoder,
    answer_tokens,
    encode_text,
)
from tests.train.data import tokenizers_in_memory as made

pytestmark = pytest.mark.transformers_compat

ONE = Conversation((Message("user", "2+2?"), Message("assistant", "4")))
TWO = Conversation((*ONE.messages, Message("user", "3+3?"), Message("assistant", "six")))


def encode(tokenizer, conversation, **choices):
    encoder = ConversationEncoder(tokenizer, **choices)
    return encoder.encode([conversation], "data.jsonl, line {}".format)[0]


def counted(tokenizer, encoded):
    """The runs of tokens that count, as text."""
    runs, last = [], -2
    for i, label in enumerate(encoded.labels()):
        if label != IGNORED:
            assert label == encoded.input_ids[i]
            runs = [*runs, ""] if i != last + 1 else runs
            runs[-1] += tokenizer.decode([label])
            last = i
    return runs


def test_the_end_token_counts_although_it_is_the_padding():
    tokenizer = made.chatml()
    encoded = encode(tokenizer, ONE)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert counted(tokenizer, encoded) == ["4<|im_end|>"]
    assert tokenizer.decode(encoded.input_ids).endswith("4<|im_end|>\n")  # the glue stays
    # what masking by padding id would have learnt: an answer that never ends
    by_id = [t for t in encoded.labels() if t not in (IGNORED, tokenizer.pad_token_id)]
    assert tokenizer.decode(by_id) == "4"


def test_the_prompt_is_what_generation_starts_from():
    tokenizer = made.chatml()
    encoded = encode(tokenizer, ONE)
    prompt = tokenizer.decode(encoded.input_ids[: encoded.prompt_length])
    assert prompt == tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?"}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("template", "end"),
    [(made.CHATML, "<|im_end|>"), (made.LLAMA3, "<|eot|>"), (PLAIN_TEMPLATE, "</s>")],
)
@pytest.mark.parametrize(
    ("loss_on", "answers"), [("completion", ["six"]), ("assistant", ["4", "six"])]
)
def test_what_counts(template, end, loss_on, answers):
    tokenizer = made.bytes_tokenizer(template)
    encoded = encode(tokenizer, TWO, loss_on=loss_on)
    assert counted(tokenizer, encoded) == [answer + end for answer in answers]


def test_everything_can_count_but_the_first_token():
    tokenizer = made.chatml()
    encoded = encode(tokenizer, TWO, loss_on="all")
    assert encoded.labels() == [IGNORED, *encoded.input_ids[1:]]
    assert encoded.prompt_length > 0


def test_an_answer_that_contains_the_question_and_the_end_marker_as_text():
    """Searching for text would find the wrong place; positions do not."""
    tokenizer = made.chatml()
    tricky = Conversation((Message("user", "4"), Message("assistant", "4\nassistant\n4")))
    assert counted(tokenizer, encode(tokenizer, tricky)) == ["4\nassistant\n4<|im_end|>"]
    empty = Conversation((Message("user", "4"), Message("assistant", "")))
    assert counted(tokenizer, encode(tokenizer, empty)) == ["<|im_end|>"]


def test_tokens_that_would_straddle_the_boundary_are_split_as_at_inference():
    glued = made.bytes_tokenizer(made.GLUED, merges=(("=", "s"), ("=", "4")))
    whole = glued("u=2+2?</s>a=4</s>", add_special_tokens=False)["input_ids"]
    for loss_on, answers in (("completion", ["six</s>"]), ("assistant", ["4</s>", "six</s>"])):
        encoded = encode(glued, TWO, loss_on=loss_on)
        assert counted(glued, encoded) == answers
    encoded = encode(glued, ONE)
    assert encoded.input_ids != whole  # the merge of = and 4 is gone
    prompt = glued("u=2+2?</s>a=", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: encoded.prompt_length] == prompt


def test_a_template_that_rewrites_earlier_turns():
    tokenizer = made.bytes_tokenizer(made.REASONING)
    assert counted(tokenizer, encode(tokenizer, TWO)) == ["<think></think>six<|im_end|>"]
    with pytest.raises(
        DataError, match=r"line 0: .*differently once later turns.*loss_on: completion"
    ):
        encode(tokenizer, TWO, loss_on="assistant")
    assert encode(tokenizer, TWO, loss_on="all").labels()[1:]


def test_generation_marks_decide_where_prefixes_fail():
    thinking = made.bytes_tokenizer(made.THINKING)
    with pytest.raises(DataError, match="generation"):
        encode(thinking, TWO)
    marked = made.bytes_tokenizer(made.MARKED)
    assert counted(marked, encode(marked, TWO)) == ["six<|im_end|>"]
    assert counted(marked, encode(marked, TWO, loss_on="assistant")) == [
        "4<|im_end|>",
        "six<|im_end|>",
    ]


def test_a_template_without_an_end_token_learns_the_whole_turn():
    endless = made.bytes_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert counted(endless, encode(endless, ONE)) == ["4\n"]


def test_a_special_token_inside_an_answer_is_not_its_end():
    endless = made.bytes_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    answer = Conversation((Message("user", "q"), Message("assistant", "a<|start|>bc")))
    assert counted(endless, encode(endless, answer)) == ["a<|start|>bc"]


def test_marks_that_mark_nothing():
    tokenizer = made.bytes_tokenizer(
        made.THINKING + "{% generation %}{% endgeneration %}"  # present, but empty
    )
    with pytest.raises(DataError, match="marks cover no token"):
        encode(tokenizer, ONE)


def test_system_prompt_only_where_there_is_none():
    tokenizer = made.chatml()
    own = Conversation((Message("system", "Mine"), *ONE.messages))
    for conversation, expected in ((ONE, "Yours"), (own, "Mine")):
        encoded = encode(tokenizer, conversation, system_prompt="Yours")
        assert f"system\n{expected}<|im_end|>" in tokenizer.decode(encoded.input_ids)


def test_conversations_without_an_answer_are_refused():
    tokenizer = made.chatml()
    question = Conversation((*ONE.messages, Message("user", "more?")))
    with pytest.raises(DataError, match=r"line 0: a completion is .* user, assistant, user"):
        encode(tokenizer, question)
    assert counted(tokenizer, encode(tokenizer, question, loss_on="assistant")) == ["4<|im_end|>"]
    monologue = Conversation((Message("assistant", "hi"),))
    for loss_on in ("completion", "assistant"):
        with pytest.raises(DataError, match="line 0"):
            encode(tokenizer, monologue, loss_on=loss_on)


def test_an_opening_assistant_turn_does_not_count():
    tokenizer = made.chatml()
    chat = Conversation((Message("assistant", "Welcome"), *ONE.messages))
    assert counted(tokenizer, encode(tokenizer, chat, loss_on="assistant")) == ["4<|im_end|>"]


def test_what_a_template_refuses_is_said_with_the_row():
    strict = made.bytes_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"line 0: .* refuses .* system, user, .*no system role"):
        encode(strict, ONE, system_prompt="x")


def test_many_conversations_keep_their_order():
    tokenizer = made.chatml()
    many = [Conversation((Message("user", "n"), Message("assistant", str(n)))) for n in range(600)]
    encoded = ConversationEncoder(tokenizer).encode(many, str)
    assert [counted(tokenizer, e) for e in encoded[255:258]] == [
        [f"{n}<|im_end|>"] for n in range(255, 258)
    ]
    assert len(encoded) == 600


def test_answer_tokens_follow_the_prompt():
    tokenizer = made.chatml()
    assert tokenizer.decode(answer_tokens(tokenizer, ONE, "five")) == "five<|im_end|>"


def test_install_template_is_kept_by_the_tokenizer(tmp_path):
    own = made.chatml()
    assert install_template(own) == "tokenizer"
    bare = made.bytes_tokenizer(None)
    assert install_template(bare) == install_template(bare) == "plain"
    bare.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == PLAIN_TEMPLATE
    hopeless = made.bytes_tokenizer(None)
    hopeless.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        install_template(hopeless)


def test_text_gets_an_end_and_the_begin_the_tokenizer_wants():
    plain = made.bytes_tokenizer(None)
    (encoded,) = encode_text(plain, Text("ab"), max_length=8)
    assert plain.decode(encoded.input_ids) == "ab</s>"
    assert encoded.labels() == [IGNORED, *encoded.input_ids[1:]]

    from tokenizers.processors import TemplateProcessing

    wrapped = made.bytes_tokenizer(None)
    wrapped.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (encoded,) = encode_text(wrapped, Text("ab"), max_length=8)
    assert wrapped.decode(encoded.input_ids) == "<s>ab</s>"  # one end, not two


@pytest.mark.parametrize("length", [3, 4, 5, 9, 16, 17])
def test_split_text_predicts_every_token_once(length):
    tokenizer = made.bytes_tokenizer(None)
    whole = encode_text(tokenizer, Text("0123456789abcdef"), max_length=99)[0].input_ids
    pieces = encode_text(tokenizer, Text("0123456789abcdef"), max_length=length)
    assert all(2 <= len(piece.input_ids) <= length for piece in pieces)
    predicted = [label for piece in pieces for label in piece.labels() if label != IGNORED]
    assert predicted == whole[1:]
    assert len(encode_text(tokenizer, Text("0" * 99), max_length=9, long_text="cut")) == 1
