"""The selected-position loss is the model's own loss, with the model's own post-processing."""

import pytest
import torch
from torch import nn

from qlora_kit.train import loss as losses
from qlora_kit.train.loss import causal_lm_loss, count_targets, selected_logits, token_losses
from tests import tiny_models

CAUSAL = [name for name in tiny_models.FAMILIES if name not in tiny_models.ENCODERS]


def make_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of different length, padded on the right, labels on scattered positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny_models.VOCAB, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = 0, 0
    labels = ids.clone()
    labels[mask == 0] = -100
    labels[0, :4] = labels[1, :5] = labels[0, 6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradients_equal_the_models_own(family: str) -> None:
    """Same value, same gradients, for every architecture, soft caps included."""
    model = tiny_models.build(family)
    batch = make_batch()
    reference = model(**batch).loss
    reference.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = causal_lm_loss(model, batch)
    ours.backward()
    eps = torch.finfo(torch.float32).eps
    assert abs(ours - reference).item() < 16 * eps * reference.item()
    for name, parameter in model.named_parameters():
        if name in wanted:
            scale = wanted[name].abs().max().clamp_min(1e-6)
            assert (parameter.grad - wanted[name]).abs().max() < 256 * eps * scale, name
    shifted = batch | {"labels": batch["labels"].roll(1, dims=1)}
    wrong = causal_lm_loss(model, shifted)
    assert abs(wrong - reference).item() > 1e3 * eps * reference.item()  # the bound bites


def test_gemma2_soft_cap_is_applied() -> None:
    """Without the cap the loss differs measurably, so equality above means something."""
    model = tiny_models.build("gemma2", final_logit_softcapping=0.5)
    capped = causal_lm_loss(model, make_batch())
    model.config.final_logit_softcapping = None
    assert abs(causal_lm_loss(model, make_batch()) - capped) > 1e-3


def test_only_counted_positions_reach_the_head() -> None:
    """The head multiplies S rows, not B*T."""
    model = tiny_models.build("llama")
    batch = make_batch()
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    selected = selected_logits(model, batch)
    count = int(count_targets(batch["labels"]))
    assert selected is not None
    assert seen == [torch.Size([1, count, tiny_models.VOCAB])]
    assert selected.rows.tolist() == sorted(selected.rows.tolist())
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    mask = losses.label_mask(batch["labels"])
    assert torch.allclose(selected.logits, full[mask], atol=1e-5)
    assert not model.lm_head._forward_pre_hooks


def test_num_items_and_empty_batches() -> None:
    """Sums divided by the accumulated count add up to the mean; nothing to learn is zero."""
    model = tiny_models.build("llama")
    first, second = make_batch(1), make_batch(2)
    second["labels"][0] = -100
    total = count_targets(first["labels"]) + count_targets(second["labels"])
    parts = [causal_lm_loss(model, b, total) for b in (first, second)]
    both = {k: torch.cat([first[k], second[k]]) for k in first}
    assert torch.allclose(sum(parts), causal_lm_loss(model, both), rtol=1e-6)
    empty = make_batch()
    empty["labels"][:] = -100
    nothing = causal_lm_loss(model, empty)
    nothing.backward()
    assert nothing.item() == 0.0


def test_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 logits, several slices, recomputed in the backward: same losses and gradient."""
    logits = torch.randn(37, 50, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 50, (37,))
    whole = token_losses(logits, targets)
    whole.sum().backward()
    gradient = logits.grad.clone()
    logits.grad = None
    monkeypatch.setattr(losses, "SLICE", 8)
    sliced = token_losses(logits, targets)
    sliced.sum().backward()
    assert torch.equal(whole, sliced)
    assert torch.equal(gradient, logits.grad)


class _NoHead(nn.Module):
    """Stands in for an architecture whose head cannot be reached."""


def test_falls_back_to_the_models_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is not called with (B, T, H), or is absent, still gives the right loss."""
    model = tiny_models.build("llama")
    batch = make_batch()
    wanted = model(**batch).loss
    monkeypatch.setattr(losses, "selectable_head", lambda _model: None)
    assert torch.allclose(causal_lm_loss(model, batch), wanted)
    unused = nn.Linear(2, 2)
    monkeypatch.setattr(losses, "selectable_head", lambda _model: unused)
    assert torch.allclose(causal_lm_loss(model, batch), wanted)
