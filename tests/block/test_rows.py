"""Packed documents and padding: every token gets the gradient it would get by itself.

Losses are sums over labelled tokens, divided by one number for all, so that documents add up.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_kit.block.install import fuse_blocks
from qlora_kit.ops.attention.rule import Documents
from qlora_kit.ops.attention.transformers_door import packed_inputs
from tests import tiny_models
from tests.block.helpers import (
    FAMILIES,
    LENGTH,
    METHODS,
    Gradients,
    counted,
    errors,
    exactly,
    gradients,
    make,
    maskless,
    truth_of,
)

UNIT = 64 * torch.finfo(torch.float64).eps

LENGTHS = ((80, 1, 19), (3, 97))
"""Tokens per document, row by row; 80 and 97 are more than a window."""


def add_gradients(model: PreTrainedModel, ids: Tensor, labels: Tensor, **inputs: object) -> None:
    """Backward of the summed loss; labels say at each place what comes next, or -100."""
    with exactly(model):
        logits = model(input_ids=ids, **inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss / 100).backward()


def next_tokens(ids: Tensor) -> Tensor:
    """Labels of rows of one document."""
    return F.pad(ids[:, 1:], (0, 1), value=-100)


def packed(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> dict[str, Tensor]:
    """Two rows of documents: ids, labels and positions that start anew in each."""
    ids = tiny_models.tokens(len(lengths), sum(lengths[0]))
    documents = [ids[i].split(row) for i, row in enumerate(lengths)]
    labels = [torch.cat([next_tokens(d[None])[0] for d in row]) for row in documents]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    return {
        "ids": ids,
        "labels": torch.stack(labels),
        "position_ids": torch.stack(positions),
    }


def one_by_one(model: PreTrainedModel, rows: dict[str, Tensor]) -> Gradients:
    """The documents' gradients, each document alone in the model's own code."""
    model.zero_grad()
    starts = Documents.from_positions(rows["position_ids"]).starts.tolist()
    ids, labels = rows["ids"].flatten(), rows["labels"].flatten()
    for start, end in pairwise(starts):
        add_gradients(model, ids[None, start:end], labels[None, start:end], use_cache=False)
    return gradients(model)


def together(model: PreTrainedModel, rows: dict[str, Tensor], starts: Documents) -> Gradients:
    """The documents' gradients, packed."""
    model.zero_grad()
    add_gradients(model, **rows, use_cache=False, **packed_inputs(starts))
    return gradients(model)


@pytest.mark.parametrize("policy", ["recompute_elementwise", "recompute_all"])
@pytest.mark.parametrize("method", ["lora", "lora_fa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_single_documents(family: str, method: str, policy: str) -> None:
    """Whatever the neighbours; a boundary one token off is found."""
    model, _ = make(family, METHODS[method])
    rows = packed()
    wanted = one_by_one(model, rows)
    fused = fuse_blocks(model, policy)
    documents = Documents.from_positions(rows["position_ids"])
    assert documents.starts.tolist() == [0, 80, 81, 100, 103, 200]
    with counted(fused) as ran:
        found = together(model, rows, documents)
    assert ran == [0, 1]
    assert max(errors(found, wanted)) < UNIT

    documents.starts[4] += 1  # the first token of the longest counts to the one before
    assert max(errors(together(model, rows, documents), wanted)) > 1e-3


def test_positions_matter() -> None:
    """Positions that run on through a row are another gradient: rotary positions are told."""
    model, _ = make()
    rows = packed()
    wanted = one_by_one(model, rows)
    fuse_blocks(model)
    documents = Documents.from_positions(rows["position_ids"])
    running = rows | {"position_ids": torch.arange(100).expand(2, -1) ** 2 // 50}
    assert max(errors(together(model, running, documents), wanted)) > 1e-3


def test_equally_long_documents() -> None:
    """They are the rows of a batch to the attention kernels."""
    model, _ = make("mistral")
    rows = packed(((25,) * 4, (25,) * 4))
    wanted = one_by_one(model, rows)
    fuse_blocks(model)
    found = together(model, rows, Documents.from_positions(rows["position_ids"]))
    assert max(errors(found, wanted)) < UNIT


def test_spare_starts_are_documents_without_tokens() -> None:
    """A fixed number of starts, as a CUDA graph needs it, and a longest that is too long."""
    model, _ = make()
    rows = packed()
    wanted = one_by_one(model, rows)
    fuse_blocks(model)
    starts = Documents.from_positions(rows["position_ids"]).starts
    spare = Documents(F.pad(starts, (0, 4), value=200), 128)
    assert max(errors(together(model, rows, spare), wanted)) < UNIT


def padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, ten tokens of the second are padding: ids, labels, mask."""
    ids = tiny_models.tokens(2, LENGTH)
    mask, labels = torch.ones_like(ids), next_tokens(ids)
    if side == "right":
        ids[1, -10:], mask[1, -10:], labels[1, -11:] = 0, 0, -100
    else:
        ids[1, :10], mask[1, :10], labels[1, :10] = 0, 0, -100
    return ids, labels, mask


@pytest.mark.parametrize("method", ["lora", "lora_fa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_needs_no_mask(family: str, method: str) -> None:
    """The gradients of the model's own code with a mask; labels at the padding are found."""
    model, _ = make(family, METHODS[method])
    ids, labels, mask = padded("right")
    add_gradients(model, ids, labels, attention_mask=mask, use_cache=False)
    wanted = gradients(model)
    fused = fuse_blocks(model)
    model.zero_grad()
    with counted(fused) as ran:
        add_gradients(model, ids, labels, **maskless())
    assert ran == [0, 1]
    assert max(errors(gradients(model), wanted)) < UNIT

    model.zero_grad()
    labels[1, -5] = 7
    add_gradients(model, ids, labels, **maskless())
    assert max(errors(gradients(model), wanted)) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_is_obeyed(side: str) -> None:
    """A mask that says more than causality goes to the layer's own code."""
    model, _ = make()
    model.set_attn_implementation("sdpa")
    ids, labels, mask = padded(side)
    add_gradients(model, ids, labels, attention_mask=mask, use_cache=False)
    wanted = gradients(model)
    fused = fuse_blocks(model)
    model.zero_grad()
    with counted(fused) as ran:
        add_gradients(model, ids, labels, attention_mask=mask, use_cache=False)
    assert ran == []
    assert max(errors(gradients(model), wanted)) == 0.0


def test_no_mask_at_all() -> None:
    """With sdpa and no window transformers makes none: the marker is not needed."""
    model, _ = make()
    ids = tiny_models.tokens(2, LENGTH)
    add_gradients(model, ids, next_tokens(ids), use_cache=False)
    wanted = gradients(model)
    model.set_attn_implementation("sdpa")
    fused = fuse_blocks(model)
    model.zero_grad()
    with counted(fused) as ran:
        add_gradients(model, ids, next_tokens(ids), use_cache=False)
    assert ran == [0, 1]
    assert max(errors(gradients(model), wanted)) < UNIT


def test_packed_bfloat16_on_an_nf4_base() -> None:
    """As training runs it: no further from float64 than the model's own code, one by one."""
    model, _ = make("llama", dtype=torch.bfloat16, nf4=True)
    rows = packed()
    truth = one_by_one(truth_of(model), rows)
    theirs = one_by_one(model, rows)
    fuse_blocks(model)
    ours = together(model, rows, Documents.from_positions(rows["position_ids"]))
    assert max(errors(ours, truth)) < 1.6 * max(errors(theirs, truth))
