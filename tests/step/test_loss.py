"""The selected-position loss is the model's own loss, with the model's own post-processing."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from qlora_kit.core.errors import ConfigError
from qlora_kit.nn import loss_head
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.loss_head import LogitRule
from qlora_kit.quant.config import QuantConfig
from qlora_kit.step import head_input as heads
from qlora_kit.step.head_input import HeadInput, head_input, label_mask
from qlora_kit.step.loss import causal_lm_loss, count_targets
from qlora_kit.train.held_out import language_model_losses, loss_totals
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


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Backward, and a copy of what every parameter got."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expect_own_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Value and gradients are the model's own, within float32's rounding; a shift is not."""
    reference = model(**batch).loss
    wanted = gradients(model, reference)
    ours = causal_lm_loss(model, batch)
    found = gradients(model, ours)
    eps = torch.finfo(torch.float32).eps
    assert abs(ours - reference).item() < 16 * eps * reference.item()
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].abs().max().clamp_min(1e-6)
        assert (found[name] - wanted[name]).abs().max() < 256 * eps * scale, name
    shifted = batch | {"labels": batch["labels"].roll(1, dims=1)}
    wrong = causal_lm_loss(model, shifted)
    assert abs(wrong - reference).item() > 1e3 * eps * reference.item()  # the bound bites


@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradients_equal_the_models_own(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every architecture, soft caps included; when the model is asked and when it is known."""
    monkeypatch.setattr(loss_head, "chunk_tokens_for", lambda _vocab: 4)
    model = tiny_models.build(family)
    batch = make_batch()
    expect_own_loss(model, batch)
    expect_own_loss(model, batch)
    selected = head_input(model, batch)
    assert selected is not None
    assert selected.head is model.get_output_embeddings()
    assert selected.states.shape == (count_targets(batch["labels"]), tiny_models.HIDDEN)


def scaled(family: str) -> PreTrainedModel:
    """A tiny model whose family multiplies or divides its logits."""
    config, model = {
        "cohere": (CohereConfig(**tiny_models._DECODER, logit_scale=0.25), CohereForCausalLM),
        "granite": (GraniteConfig(**tiny_models._DECODER, logits_scaling=8.0), GraniteForCausalLM),
    }[family]
    torch.manual_seed(0)
    return model(config).eval()


@pytest.mark.parametrize(("family", "scale"), [("cohere", 0.25), ("granite", 0.125)])
def test_logit_scales(family: str, scale: float) -> None:
    """A factor in the configuration is found, whichever way round the family uses it."""
    model = scaled(family)
    expect_own_loss(model, make_batch())
    selected = head_input(model, make_batch())
    assert selected is not None
    assert selected.rule == LogitRule(scale=scale)


class _Odd(nn.Module):
    """A model's forward followed by something that no configuration tells of."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.own = model.forward

    def forward(self, **inputs: Tensor):
        out = self.own(**inputs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1]) / 100
        return out


def test_unknown_rules_are_left_to_the_model() -> None:
    """The model's code makes the logits, and the first forward draws the same dropout."""
    model = tiny_models.build("gpt2", embd_pdrop=0.5).train()
    batch = make_batch()
    odd = _Odd(model)
    torch.manual_seed(1)
    first = causal_lm_loss(model, batch, forward=odd)  # asks, then runs again
    after_first = torch.get_rng_state()
    torch.manual_seed(1)
    second = causal_lm_loss(model, batch, forward=odd)
    assert torch.equal(first, second)
    assert torch.equal(after_first, torch.get_rng_state())
    torch.manual_seed(1)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = odd(**inputs).logits[label_mask(batch["labels"])]
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    assert torch.allclose(first, F.cross_entropy(logits, targets), rtol=1e-6)
    plain = F.cross_entropy(logits - torch.arange(logits.shape[-1]) / 100, targets)
    assert not torch.allclose(first, plain, rtol=1e-3)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_router_loss_is_added(family: str) -> None:
    """With the balancing loss on, it is the model's own loss again, gradients of routers too."""
    model = tiny_models.build(family, output_router_logits=True, router_aux_loss_coef=0.5)
    batch = make_batch()
    expect_own_loss(model, batch)
    selected = head_input(model, batch)
    assert selected is not None
    assert selected.router_loss is not None
    assert selected.router_loss.item() > 0.1
    without = selected.losses().total / count_targets(batch["labels"])
    assert causal_lm_loss(model, batch) - without > 0.1
    items = torch.tensor(100)
    assert torch.allclose(
        causal_lm_loss(model, batch, items), model(**batch, num_items_in_batch=items).loss
    )
    assert loss_totals(model, [batch]).metrics()["loss"] == pytest.approx(without.item())


def test_router_loss_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that should add one, and does not tell how much, keeps its own loss."""
    model = tiny_models.build("mixtral", output_router_logits=True)
    wanted = model(**make_batch()).loss
    run = model.forward

    def rename(**inputs: Tensor):
        out = run(**inputs)
        if out.loss is None:
            out["aux_loss"] = None
        return out

    monkeypatch.setattr(model, "forward", rename)
    assert head_input(model, make_batch()) is None
    assert torch.allclose(causal_lm_loss(model, make_batch()), wanted)


def test_nf4_head() -> None:
    """A quantized head: its own output, so the model's own loss; gradients go through it."""
    model = tiny_models.build("llama")
    model.lm_head = NF4Linear.from_linear(model.lm_head, QuantConfig())
    expect_own_loss(model, make_batch())


def test_bfloat16_model() -> None:
    """The cap is taken in float32, so the loss is closer to exact than the model's own."""
    model = tiny_models.build("gemma2", final_logit_softcapping=0.5, dtype=torch.bfloat16)
    batch = make_batch()
    ours = causal_lm_loss(model, batch)
    selected = head_input(model, batch)
    assert selected is not None
    assert selected.rule == LogitRule(softcap=0.5)
    raw = model.lm_head(selected.states).double()
    exact = F.cross_entropy(0.5 * torch.tanh(raw / 0.5), selected.targets)
    assert abs(ours - exact) < 1e-6 * exact
    assert abs(model(**batch).loss - exact) < 2**-8 * exact


def test_autocast_within_the_forward_only() -> None:
    """A wrapper that autocasts the model's forward is followed by the head."""
    model = tiny_models.build("llama")
    batch = make_batch()

    def forward(**inputs: Tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**inputs)

    wanted = forward(**batch).loss
    for _ in ("asked", "known"):
        ours = causal_lm_loss(model, batch, forward=forward)
        assert torch.allclose(ours, wanted, rtol=1e-6)
    assert not torch.allclose(causal_lm_loss(model, batch), wanted, rtol=1e-6)


def test_sharded_head_stays_in_the_models_forward() -> None:
    """A head whose weight is gathered by the forward is not read outside of it."""
    model = tiny_models.build("llama")
    model.lm_head.weight.full_tensor = lambda: None  # what tells a sharded parameter
    selected = head_input(model, make_batch())
    assert selected is not None
    assert selected.states.shape[1] == tiny_models.VOCAB
    expect_own_loss(model, make_batch())


def test_label_smoothing() -> None:
    """As torch spreads it; refused where the model keeps its own loss."""
    model = tiny_models.build("llama")
    batch = make_batch()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2
    )
    assert torch.allclose(causal_lm_loss(model, batch, label_smoothing=0.2), wanted, rtol=1e-6)
    assert not torch.allclose(causal_lm_loss(model, batch), wanted, rtol=1e-4)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        causal_lm_loss(model, batch, label_smoothing=0.2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
def test_evaluation_takes_the_same_losses(family: str) -> None:
    """Token by token those of all logits, and logits of single positions where asked."""
    model = tiny_models.build(family)
    batch = make_batch()
    with torch.no_grad():
        full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses, selected = language_model_losses(model, batch)
    kept = full[label_mask(batch["labels"])]
    wanted = F.cross_entropy(kept, selected.targets, reduction="none")
    assert torch.allclose(losses, wanted, rtol=1e-6, atol=1e-6)
    assert torch.allclose(selected.logits(selected.rows == 1), kept[selected.rows == 1], atol=1e-6)
    assert not torch.allclose(losses, wanted.roll(1), rtol=1e-3)


def test_gemma2_soft_cap_is_applied() -> None:
    """Without the cap the loss differs measurably, so equality above means something."""
    model = tiny_models.build("gemma2", final_logit_softcapping=0.5)
    capped = causal_lm_loss(model, make_batch())
    model.config.final_logit_softcapping = None
    assert abs(causal_lm_loss(model, make_batch()) - capped) > 1e-3


@pytest.mark.parametrize("hooked", [False, True])
def test_only_counted_positions_reach_the_head(
    hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's forward shows the head one token at most; the loss shows it S in chunks."""
    monkeypatch.setattr(loss_head, "chunk_tokens_for", lambda _vocab: 4)
    model = tiny_models.build("llama")
    batch = make_batch()
    count = int(count_targets(batch["labels"]))
    seen: list[int] = []
    inputs = nn.Linear.forward

    def count_rows(layer: nn.Linear, x: Tensor) -> Tensor:
        if layer is model.lm_head:
            seen.append(x.numel() // x.shape[-1])
        return inputs(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", count_rows)
    if hooked:
        model.lm_head.register_forward_hook(lambda _m, _i, _o: None)
    causal_lm_loss(model, batch)
    causal_lm_loss(model, batch)
    chunks = [min(4, count - start) for start in range(0, count, 4)] if hooked else []
    assert seen == [1, *chunks, 1 if hooked else 0, *chunks]
    assert not model.lm_head._forward_pre_hooks


def test_positions_are_in_order() -> None:
    """Rows ascend; each target is the token after its position."""
    batch = make_batch()
    selected = head_input(tiny_models.build("llama"), batch)
    assert isinstance(selected, HeadInput)
    assert selected.rows.tolist() == sorted(selected.rows.tolist())
    following = batch["labels"][selected.rows, selected.positions + 1]
    assert torch.equal(selected.targets, following)
    assert len(following) == count_targets(batch["labels"])


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


class _NoHead(nn.Module):
    """Stands in for an architecture whose head cannot be reached."""


def test_falls_back_to_the_models_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is not called with (B, T, H), or is absent, still gives the right loss."""
    model = tiny_models.build("llama")
    batch = make_batch()
    wanted = model(**batch).loss
    monkeypatch.setattr(heads, "selectable_head", lambda _model: None)
    assert torch.allclose(causal_lm_loss(model, batch), wanted)
    unused = nn.Linear(2, 2)
    monkeypatch.setattr(heads, "selectable_head", lambda _model: unused)
    assert torch.allclose(causal_lm_loss(model, batch), wanted)
