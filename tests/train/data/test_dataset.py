"""The whole way from a configuration to a tokenized set and its account."""

import json

import pytest

from qlora_kit.core.errors import ConfigError, DataError
from qlora_kit.train.config import DataConfig
from qlora_kit.train.data.collate import (
    ClassificationCollator,
    PackedCollator,
    PadCollator,
    make_collator,
)
from qlora_kit.train.data.dataset import build_dataset, eval_names
from tests.train.data.tokenizers_in_memory import bytes_tokenizer, chatml

LONG = "x" * 200


@pytest.fixture
def file(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def pairs(count, prompt="q"):
    return [{"prompt": f"{prompt}{n}", "completion": f"a{n}"} for n in range(count)]


def texts(dataset, tokenizer):
    return [tokenizer.decode(row["input_ids"]) for row in dataset]


def test_rows_are_plain_lists_and_the_account_adds_up(file):
    tokenizer = chatml()
    dataset = build_dataset(DataConfig(train=file(pairs(3))), tokenizer)
    assert len(dataset) == len(list(dataset)) == 3
    row = dataset[0]
    assert set(row) == {"input_ids", "labels"}
    assert all(isinstance(v, list) and isinstance(v[0], int) for v in row.values())
    report = dataset.report
    assert report.tokens == sum(dataset.lengths) == sum(len(r["input_ids"]) for r in dataset)
    assert report.loss_tokens == sum(label != -100 for r in dataset for label in r["labels"]) == 9
    assert (report.rows, report.examples, report.packed_rows) == (3, 3, 3)
    assert (report.format, report.template) == ("prompt_completion", "tokenizer")
    assert dataset.examples == []
    assert report.to_dict()["longest"] == max(dataset.lengths)


def test_truncation_is_counted_and_empty_handed_examples_are_dropped(file):
    tokenizer = chatml()
    short, long_answer, long_prompt = (
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": LONG},
        {"prompt": LONG, "completion": "a"},
    )
    config = DataConfig(train=file([short, long_answer, long_prompt]), max_length=64)
    dataset = build_dataset(config, tokenizer)
    whole = build_dataset(DataConfig(train=config.train), tokenizer)
    report = dataset.report
    assert (report.rows, report.examples, report.truncated, report.dropped) == (3, 2, 2, 1)
    assert report.tokens_lost == whole.report.tokens - report.tokens - 64
    assert dataset.lengths == [whole.lengths[0], 64]
    assert all(any(label != -100 for label in row["labels"]) for row in dataset)
    with pytest.raises(DataError, match=r"none of the 1 rows .* Raise data\.max_length"):
        build_dataset(DataConfig(train=file([long_prompt]), max_length=64), tokenizer)


def test_the_tokenizers_own_limit_holds(file):
    tokenizer = chatml()
    tokenizer.model_max_length = 40
    path = file([*pairs(1), {"prompt": "q", "completion": LONG}])
    report = build_dataset(DataConfig(train=path), tokenizer).report
    assert (report.max_length, report.longest) == (40, 40)


def test_eval_fraction_parts_the_rows_the_same_way_every_time(file):
    tokenizer = chatml()
    config = DataConfig(train=file(pairs(50)), eval_fraction=0.2)
    train, held_out = (
        texts(build_dataset(config, tokenizer, w), tokenizer) for w in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (40, 10)
    assert not set(train) & set(held_out)
    assert train == sorted(train, key=lambda t: int(t.split("q")[1].split("<")[0]))
    again = build_dataset(config, tokenizer, "eval")
    assert texts(again, tokenizer) == held_out
    assert texts(build_dataset(config, tokenizer, "eval", seed=1), tokenizer) != held_out
    with pytest.raises(DataError, match="leaves none to train on"):
        build_dataset(DataConfig(train=file(pairs(1)), eval_fraction=0.5), tokenizer)


def test_named_held_out_sets(file):
    tokenizer = chatml()
    config = DataConfig(
        train=file(pairs(2)),
        eval=file(pairs(3, "e"), "eval.jsonl"),
        eval_sets={"unseen": file(pairs(4, "u"), "unseen.jsonl")},
        limit_eval=3,
    )
    assert eval_names(config) == ("eval", "unseen")
    unseen = build_dataset(config, tokenizer, "unseen")
    assert [e.prompt for e in unseen.examples] == ["u0", "u1", "u2"]
    assert build_dataset(config, tokenizer, "eval").examples[0].prompt == "e0"
    with pytest.raises(
        ConfigError, match="no set 'other'; this configuration has train, eval, uns"
    ):
        build_dataset(config, tokenizer, "other")


def test_examples_hold_prompts_ready_to_generate_from(file):
    tokenizer = chatml()
    config = DataConfig(train="unused.jsonl", eval=file(pairs(2)))
    dataset = build_dataset(config, tokenizer, "eval")
    example = dataset.examples[1]
    assert (example.prompt, example.reference) == ("q1", "a1")
    assert tokenizer.decode(example.prompt_ids).endswith(
        "user\nq1<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dataset[1]["input_ids"][: len(example.prompt_ids)] == list(example.prompt_ids)


def test_choices_by_their_first_token(file):
    tokenizer = chatml()
    dataset = build_dataset(DataConfig(train="x.jsonl", eval=file(pairs(2))), tokenizer, "eval")
    assert tokenizer.decode(dataset.choice_tokens(["yes", "no"])) == "yn"
    with pytest.raises(DataError, match="'no' and 'never' start with the same token"):
        dataset.choice_tokens(["yes", "no", "never"])
    text = build_dataset(DataConfig(train="x", eval=file([{"text": "hello"}])), tokenizer, "eval")
    with pytest.raises(DataError, match="nothing to choose between"):
        text.choice_tokens(["yes", "no"])


def test_packing_fills_training_rows_only(file):
    tokenizer = chatml()
    config = DataConfig(
        train=file(pairs(20)), eval=file(pairs(5), "e.jsonl"), packing=True, max_length=256
    )
    plain = build_dataset(DataConfig(train=config.train), tokenizer)
    packed, held_out = (build_dataset(config, tokenizer, which) for which in ("train", "eval"))
    assert packed.packed
    assert not held_out.packed
    assert len(packed) == packed.report.packed_rows < packed.report.examples == 20
    assert packed.report.tokens == plain.report.tokens == sum(packed.lengths)
    assert packed.report.loss_tokens == plain.report.loss_tokens
    assert max(packed.lengths) <= 256
    for row in packed:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        assert [row["labels"][i] for i in starts] == [-100] * len(starts)
        assert len(row["position_ids"]) == len(row["input_ids"]) == len(row["labels"])


def test_long_text_is_split_or_cut(file):
    path = file([{"text": LONG}, {"text": ""}])
    split = build_dataset(DataConfig(train=path, max_length=64), chatml()).report
    assert (split.examples, split.truncated, split.dropped, split.template) == (4, 0, 1, "none")
    assert split.loss_tokens == 200  # all but the first, and the end token
    cut = build_dataset(DataConfig(train=path, max_length=64, long_text="cut"), chatml()).report
    assert (cut.examples, cut.truncated, cut.tokens_lost) == (1, 1, 201 - 64)


def test_columns_limits_and_the_plain_template(file):
    tokenizer = bytes_tokenizer(None)
    config = DataConfig(
        train=file([{"question": "q", "answer": "a"}] * 5),
        columns={"question": "prompt", "answer": "completion"},
        limit_train=2,
    )
    dataset = build_dataset(config, tokenizer)
    assert texts(dataset, tokenizer) == ["### User:\nq\n\n### Assistant:\na</s>"] * 2
    assert dataset.report.template == "plain"
    assert dataset.report.rows == 2


@pytest.mark.parametrize(
    ("labels", "given", "names", "ids"),
    [
        (["b", "a"], (), ("a", "b"), [1, 0]),
        (["b", "a"], ("b", "a"), ("b", "a"), [0, 1]),
        ([2, 0], (), ("0", "1", "2"), [2, 0]),
        ([1, 0], ("no", "yes"), ("no", "yes"), [1, 0]),
        (["1", "0"], ("0", "1"), ("0", "1"), [1, 0]),  # a CSV file
    ],
)
def test_classes(file, labels, given, names, ids):
    path = file([{"text": "t", "label": label} for label in labels])
    dataset = build_dataset(
        DataConfig(train=path), chatml(), task="sequence_classification", labels=given
    )
    assert dataset.label_names == names
    assert [row["labels"] for row in dataset] == ids
    assert dataset.report.loss_tokens == 2


def test_classes_that_do_not_fit(file):
    path = file([{"text": "t", "label": "a"}, {"text": "t", "label": "c"}])
    build = {"task": "sequence_classification"}
    with pytest.raises(DataError, match=r"line 2: 'c' is none of the classes a, b"):
        build_dataset(DataConfig(train=path), chatml(), labels=("a", "b"), **build)
    with pytest.raises(DataError, match="only the class a"):
        build_dataset(DataConfig(train=path, limit_train=1), chatml(), **build)


def test_classification_keeps_the_closing_token_when_it_cuts(file):
    from tokenizers.processors import TemplateProcessing

    tokenizer = chatml()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    path = file([{"text": LONG, "label": 0}, {"text": "t", "label": 1}])
    dataset = build_dataset(
        DataConfig(train=path, max_length=16), tokenizer, task="sequence_classification"
    )
    assert dataset.lengths == [16, 3]
    assert dataset[0]["input_ids"][-1] == 1
    assert (dataset.report.truncated, dataset.report.tokens_lost) == (1, 202 - 16)


def test_the_collator_that_suits(file):
    tokenizer = chatml()
    path, labelled = file(pairs(3)), file([{"text": "t", "label": n} for n in (0, 1)], "c.jsonl")
    plain = build_dataset(DataConfig(train=path), tokenizer)
    packed = build_dataset(DataConfig(train=path, packing=True), tokenizer)
    classes = build_dataset(DataConfig(train=labelled), tokenizer, task="sequence_classification")
    assert make_collator(plain) == PadCollator(3, 1)
    assert make_collator(packed, pad_to_multiple_of=8, flatten=True) == PackedCollator(3, 8, True)
    assert make_collator(classes) == ClassificationCollator(3, 1)
    for dataset in (plain, packed, classes):
        assert make_collator(dataset)(list(dataset))["input_ids"].shape[0] == len(dataset)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 4}, "max_length has to be at least 8"),
        ({"limit_train": 0}, "limit_train has to be at least 1"),
        ({"eval_fraction": 1.0}, "eval_fraction is a share"),
        ({"eval_sets": {"train": "x"}}, "cannot use the name 'train'"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_dataset(DataConfig(train="x.jsonl", **fields), chatml())


def test_no_held_out_rows(file):
    with pytest.raises(ConfigError, match=r"set data\.eval"):
        build_dataset(DataConfig(train=file(pairs(2))), chatml(), "eval")
    assert eval_names(DataConfig(train="x")) == ()
