"""Padding is masked by position; ids and labels are untouched."""

import pytest
import torch

from qlora_kit.train.data.collate import (
    ClassificationCollator,
    PackedCollator,
    PadCollator,
    collate_prompts,
    padding_share,
)

ROWS = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7], "labels": [-100]}]


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (8, 8), (3, 3)])
def test_pad(multiple, length):
    batch = PadCollator(2, multiple)(ROWS)
    assert {name: t.shape for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, length)
    )
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert batch["labels"][0, :3].tolist() == [-100, 6, 2]  # id 2 pads, and counts where it is real
    assert batch["attention_mask"].sum(1).tolist() == [3, 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_packed_padding_is_a_document_of_its_own():
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "position_ids": [0, 1, 0]}
    batch = PackedCollator(2, 8)([row])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 3, 4]]
    assert batch["labels"][0, 3:].tolist() == [-100] * 5
    assert batch["use_cache"] is False


def test_classification():
    batch = ClassificationCollator(0, 4)([{"input_ids": [5, 6], "labels": 1}] * 2)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0]] * 2
    assert batch["labels"].tolist() == [1, 1]


def test_prompts_end_in_the_last_column():
    batch = collate_prompts([(5, 6), (7,)], 9)
    assert batch["input_ids"].tolist() == [[5, 6], [9, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_padding_share():
    assert padding_share([2, 2, 2], 2, grouped=False) == 0
    assert padding_share([], 2, grouped=True) == 0
    assert padding_share([1, 3, 1, 3], 4, grouped=True) == pytest.approx(1 / 3)
