"""Packed examples give the logits, loss and gradients of unpacked ones."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.train.data.collate import PackedCollator, PadCollator
from qlora_kit.train.data.packing import join, plan_rows
from tests import tiny_models

pytestmark = pytest.mark.transformers_compat

EPS = torch.finfo(torch.float32).eps
FAMILIES = [("llama", "eager"), ("llama", "sdpa"), ("mistral", "sdpa"), ("gemma3", "sdpa"),
            ("qwen3", "sdpa"), ("gpt2", "sdpa"), ("phi", "sdpa"), ("gemma2", "eager"),
            ("mixtral", "eager")]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_example_once_and_nothing_too_much(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 100) for _ in range(500)]
    rows = plan_rows(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 100
    fewest = -(-sum(lengths) // 100)
    assert len(rows) <= 11 / 9 * fewest + 1  # the guarantee of best-fit decreasing
    assert rows == plan_rows(lengths, 100)


def test_edges():
    assert plan_rows([], 8) == []
    assert plan_rows([8, 8], 8) == [[0], [1]]
    with pytest.raises(ValueError, match="does not fit"):
        plan_rows([9], 8)


def documents():
    draw = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 256, (n,), generator=draw).tolist() for n in (9, 4, 12, 1, 6)]
    return [(ids, [-100, *ids[1:]]) for ids in made]


def packed_row(docs):
    row = join(docs)
    return {"input_ids": row.input_ids, "labels": row.labels, "position_ids": row.position_ids}


def run(model, batch):
    """Summed loss, logits and gradients of a batch."""
    model.zero_grad()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), logits.detach(), grads


def distance(grads, others):
    """Largest relative difference of any parameter's gradient."""
    return max(float((grads[n] - others[n]).norm() / others[n].norm()) for n in others)


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_packed_equals_unpacked_and_contaminated_does_not(family, attention):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_models.saved(family), attn_implementation=attention
    ).eval()
    docs = documents()
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in docs]
    loss, logits, grads = run(model, PadCollator(0)(rows))
    # two rows of unequal length, so that the padding of a packed row is tested too
    collate = PackedCollator(0, pad_to_multiple_of=8)
    batch = collate([packed_row(docs[:3]), packed_row(docs[3:])])
    assert "attention_mask" not in batch
    packed_loss, packed_logits, packed_grads = run(model, batch)

    # float32 sums of a few hundred terms in another order
    bound = 400 * EPS
    assert abs(packed_loss - loss) / loss < bound
    assert distance(packed_grads, grads) < bound
    at = 0
    for i, (ids, _) in enumerate(docs[:3]):
        want, got = logits[i, : len(ids)], packed_logits[0, at : at + len(ids)]
        assert (got - want).norm() / want.norm() < bound
        at += len(ids)

    contaminated = {**batch, "use_cache": True}  # transformers then ignores the positions
    _, _, wrong = run(model, contaminated)
    assert distance(wrong, grads) > 100 * bound
    one_document = {k: v for k, v in batch.items() if k != "position_ids"}
    _, _, wrong = run(model, one_document)
    assert distance(wrong, grads) > 100 * bound


def test_flattened_batch_is_one_row_with_the_same_gradients():
    model = AutoModelForCausalLM.from_pretrained(tiny_models.saved("llama")).eval()
    docs = documents()
    rows = [packed_row(docs[:3]), packed_row(docs[3:])]
    flat = PackedCollator(0, flatten=True)(rows)
    assert flat["input_ids"].shape == (1, sum(len(ids) for ids, _ in docs))
    loss, _, grads = run(model, PackedCollator(0)(rows))
    flat_loss, _, flat_grads = run(model, flat)
    assert abs(flat_loss - loss) / loss < 400 * EPS
    assert distance(flat_grads, grads) < 400 * EPS


def test_the_first_token_of_a_document_is_never_predicted():
    with pytest.raises(AssertionError):
        join([([1, 2], [-100, 2]), ([3, 4], [3, 4])])
