"""Prefixes, infixes, prompts and PreLayer: formulas in float64, caches, padding, PEFT both ways."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.prompt.answer_start import announced
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.block.install import why_not_fused
from qlora_kit.core.errors import AdapterError, ConfigError, FormatError
from qlora_kit.export.merge import merge
from qlora_kit.nn.host_embedding import keep_embeddings_on_host
from qlora_kit.step.loss import causal_lm_loss
from tests import tiny_models
from tests.adapters.bases import F32_EPS, quantize, relative_error

CONFIGS = {
    "prefix": PrefixTuning(length=3, hidden=None),
    "prefix_mlp": PrefixTuning(length=3, hidden=8),
    "infix": PrefixTuning(length=3, hidden=8, place="infix"),
    "prompt": PromptTuning(length=3),
    "prompt_infix": PromptTuning(length=3, place="infix"),
    "prelayer": PromptTuning(length=3, layers="all"),
    "prelayer_infix": PromptTuning(length=3, layers="all", place="infix"),
}
DECODERS = ("llama", "gpt2", "gemma2", "mistral", "qwen3")
ENCODERS = ("bert", "roberta")
ERROR = 2000 * F32_EPS  # roundings of two layers, forward and backward
FAMILY_CASES = [(f, n) for f in DECODERS for n in CONFIGS] + [
    (f, n) for f in ENCODERS for n in CONFIGS if "infix" not in n
]


def answer(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**{"input_ids": tiny_models.tokens()} | inputs).logits


def shake(adapter, scale: float = 0.3) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


@pytest.mark.transformers_compat
@pytest.mark.parametrize(("family", "name"), FAMILY_CASES)
def test_from_start_to_removal(family, name):
    model = quantize(tiny_models.build(family))
    before = answer(model)
    modules, way = dict(model.named_modules()), model.config._attn_implementation
    adapter = attach(model, CONFIGS[name])
    trained = {id(p) for p in adapter.parameters()}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert "beside its tokens" in why_not_fused(model)
    after = answer(model)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(answer(model), before)
    assert torch.equal(answer(model), after)
    model(tiny_models.tokens()).logits.square().mean().backward()
    assert adapter.without_gradient() == ()
    with pytest.raises(AdapterError, match="already carries"):
        attach(copy.deepcopy(model), CONFIGS[name])
    adapter.detach_from_model()
    assert torch.equal(answer(model), before)
    assert dict(model.named_modules()) == modules
    assert model.config._attn_implementation == way
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def by_hand(model: nn.Module, ids: torch.Tensor, states: torch.Tensor, last: int) -> torch.Tensor:
    """Llama with l positions behind token `last` (-1: in front): states (L, 2, l, heads, dim).

    Every layer written out; K and V of the positions are given, nothing is computed for them.
    """
    config, base = model.config, model.model
    length, virtual = ids.shape[1], states.shape[2]
    tokens = torch.arange(length)
    sees = tokens >= last
    positions = tokens + virtual * sees
    hidden = base.embed_tokens(ids)
    cos, sin = base.rotary_emb(hidden, positions[None])
    cos, sin = cos.double()[:, None], sin.double()[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def norm(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return layer.weight * x * scale

    lower = torch.ones(length, length).tril() > 0
    causal = torch.cat([sees[:, None].expand(-1, virtual), lower], 1)
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer, (prefix_k, prefix_v) in zip(base.layers, states, strict=True):
        x, heads = norm(hidden, layer.input_layernorm), (*ids.shape, -1, config.head_dim)
        q, k, v = (
            getattr(layer.self_attn, f"{n}_proj")(x).view(heads).transpose(1, 2) for n in "qkv"
        )
        q, k = rotate(q), rotate(k)
        rows = len(ids)
        k = torch.cat([prefix_k.transpose(0, 1).expand(rows, -1, -1, -1), k], 2)
        v = torch.cat([prefix_v.transpose(0, 1).expand(rows, -1, -1, -1), v], 2)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.mT / config.head_dim**0.5).masked_fill(~causal, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = hidden + layer.self_attn.o_proj(mixed)
        x, mlp = norm(hidden, layer.post_attention_layernorm), layer.mlp
        gate = nn.functional.silu(mlp.gate_proj(x))
        hidden = hidden + mlp.down_proj(gate * mlp.up_proj(x))
    return model.lm_head(norm(hidden, base.norm))


@pytest.mark.parametrize("name", ["prefix", "prefix_mlp", "infix"])
def test_the_formula_and_its_gradients_on_grouped_queries(name):
    model = tiny_models.build("llama")
    twin = copy.deepcopy(model).double()
    adapter = attach(model, CONFIGS[name], seed=2)
    shake(adapter)
    ids = tiny_models.tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    with announced(labels):
        logits = model(ids).logits
    g = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    logits.backward(g)

    p = {
        k.rpartition("prefix.")[2]: v.detach().double().requires_grad_()
        for k, v in adapter.named_parameters()
    }
    if name == "prefix":
        values = p["values"]
    else:
        inner = torch.tanh(p["embedding"] @ p["inner.weight"].T + p["inner.bias"])
        values = inner @ p["outer.weight"].T + p["outer.bias"]
    states = values.view(3, 2, 2, 2, 16).permute(1, 2, 0, 3, 4)  # (l, L, K or V, heads, dim)
    last = 3 if name == "infix" else -1
    truth = by_hand(twin, ids, states, last)
    truth.backward(g.double())

    assert relative_error(logits, truth) < ERROR
    wrong = by_hand(twin, ids, states.flip(1), last)  # K and V exchanged
    assert relative_error(logits, wrong) > ERROR
    moved = by_hand(twin, ids, states, last + 2)
    assert relative_error(logits, moved) > ERROR or last == -1
    for key, parameter in adapter.named_parameters():
        exact = p[key.rpartition("prefix.")[2]].grad
        assert relative_error(parameter.grad, exact) < ERROR, key
        assert relative_error(1.001 * parameter.grad, exact) > ERROR


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("last", [None, 3])
def test_a_prompt_is_what_embeddings_by_hand_give(family, last):
    """[P; x] or [x; P; y] as `inputs_embeds` of a float64 twin: logits and gradient."""
    model = tiny_models.build(family)
    twin = copy.deepcopy(model).double()
    place = "prefix" if last is None else "infix"
    adapter = attach(model, PromptTuning(length=3, place=place), seed=2)
    ids = tiny_models.tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    with announced(labels):
        logits = model(ids).logits
    g = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    logits.backward(g)

    (own,) = adapter.parameters()
    ours = own.detach().double().requires_grad_()
    embeds, cut = twin.get_input_embeddings()(ids), 0 if last is None else last + 1
    mixed = torch.cat([embeds[:, :cut], ours.expand(2, -1, -1), embeds[:, cut:]], 1)
    found = twin(inputs_embeds=mixed).logits
    kept = list(range(3, 10)) if last is None else [0, 1, 2, 6, 7, 8, 9]  # 6: P's last predicts
    found[:, kept].backward(g.double())
    assert relative_error(logits, found[:, kept]) < ERROR
    assert relative_error(logits, found[:, :7]) > ERROR
    assert relative_error(own.grad, ours.grad) < ERROR
    assert relative_error(1.001 * own.grad, ours.grad) > ERROR


def test_prelayer_replaces_what_enters_every_block():
    model = tiny_models.build("llama")
    twin = copy.deepcopy(model).double()
    adapter = attach(model, CONFIGS["prelayer"])
    shake(adapter)
    ids = tiny_models.tokens()
    logits = model(ids).logits
    g = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    logits.backward(g)
    first, later = (p.detach().double().requires_grad_() for p in adapter.parameters())
    embeds = torch.cat([first.expand(2, -1, -1), twin.get_input_embeddings()(ids)], 1)

    def replace(_module, args, _kwargs):
        return (torch.cat([later[0].expand(2, -1, -1), args[0][:, 3:]], 1), *args[1:]), _kwargs

    wrong = twin(inputs_embeds=embeds).logits[:, 3:]
    twin.model.layers[1].register_forward_pre_hook(replace, with_kwargs=True)
    found = twin(inputs_embeds=embeds).logits[:, 3:]
    found.backward(g.double())
    assert relative_error(logits, found) < ERROR
    assert relative_error(logits, wrong) > ERROR
    for own, exact in zip(adapter.parameters(), (first.grad, later.grad), strict=True):
        assert relative_error(own.grad, exact) < ERROR
        assert relative_error(1.001 * own.grad, exact) > ERROR


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_is_generation_without(family, name):
    """Left padding too: a shorter row beside a longer one answers as it does alone."""
    model = tiny_models.build(family)
    shake(attach(model, CONFIGS[name], seed=4))
    ids = tiny_models.tokens()
    padded = ids.clone()
    padded[0, :2] = 0
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(padded, attention_mask=mask, **options)
    for row, start in ((0, 2), (1, 0)):
        text, prompt = ids[row : row + 1, start:], 7 - start
        for _ in range(5):
            labels = torch.full_like(text, -100)
            labels[:, prompt:] = text[:, prompt:]
            with announced(labels if text.shape[1] > prompt else None), torch.no_grad():
                logits = model(text, use_cache=False).logits
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(made[row, start:], text[0])


@pytest.mark.parametrize(("family", "name"), FAMILY_CASES)
def test_padding_on_the_right_changes_nothing(family, name):
    model = tiny_models.build(family)
    shake(attach(model, CONFIGS[name], seed=4))
    ids = tiny_models.tokens()
    labels = ids.clone()
    labels[:, :3] = -100
    with announced(labels):
        alone = answer(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    more = nn.functional.pad(ids, (0, 4), value=1 if family == "roberta" else 0)
    if family == "roberta":  # whose padding is told by its id
        more[:, 7:] = model.config.pad_token_id
    mask = nn.functional.pad(torch.ones_like(ids), (0, 4))
    with announced(nn.functional.pad(labels, (0, 4), value=-100)):
        padded = answer(model, input_ids=more, attention_mask=mask)[:, :7]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_pass_through_checkpointing(family, name):
    model = tiny_models.build(family).train()
    adapter = attach(model, CONFIGS[name], seed=2)
    ids = tiny_models.tokens()
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(7) < 3, -100)}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        causal_lm_loss(model, batch).backward()
        return {n: p.grad.clone() for n, p in adapter.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, found in gradients().items():
        assert plain[key].abs().max() > 0
        torch.testing.assert_close(found, plain[key])
    with torch.no_grad():  # announced by the step, or as the model's own argument
        own = model(**batch).loss
    torch.testing.assert_close(causal_lm_loss(model, batch), own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in CONFIGS if "infix" not in n])
@pytest.mark.parametrize("family", ENCODERS)
def test_classifiers(family, name, tmp_path):
    model = tiny_models.build(family, num_labels=3)
    before = answer(model)
    adapter = attach(model, CONFIGS[name])
    shake(adapter)
    wanted = answer(model)
    assert not torch.allclose(wanted, before, atol=1e-3)
    adapter.save(tmp_path / "a")
    fresh = tiny_models.build(family, num_labels=3)
    load_adapter(fresh, tmp_path / "a")
    torch.testing.assert_close(answer(fresh), wanted, rtol=1e-5, atol=1e-6)


def test_a_prefix_that_is_not_asked_for_is_an_error():
    model = tiny_models.build("llama")
    attach(model, CONFIGS["prefix"])
    model.set_attn_implementation("sdpa")
    with pytest.raises(AdapterError, match="0 of 2 layers"):
        answer(model)


def test_packed_rows():
    """A prefix is seen by every document alike; a prompt would be by the first alone."""
    ids = tiny_models.tokens(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    model = tiny_models.build("llama")
    adapter = attach(model, CONFIGS["prefix"])
    shake(adapter)
    packed = answer(model, input_ids=ids, position_ids=positions, use_cache=False)
    alone = [answer(model, input_ids=part) for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    adapter.detach_from_model()
    attach(model, CONFIGS["prompt"])
    with pytest.raises(AdapterError, match="packed"):
        answer(model, input_ids=ids, position_ids=positions, use_cache=False)


def test_refusals(tmp_path):
    for name in ("infix", "prompt_infix"):
        with pytest.raises(AdapterError, match="encoder has none"):
            attach(tiny_models.build("bert"), CONFIGS[name])
    with pytest.raises(AdapterError, match="of transformers"):
        attach(nn.Linear(1, 1), CONFIGS["prefix"])
    for wrong in (PrefixTuning, PromptTuning):
        with pytest.raises(ConfigError):
            wrong(length=0)
    folder = tiny_models.saved("llama")
    for name in ("prefix", "prompt"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        adapter = attach(model, CONFIGS[name])
        adapter.save(tmp_path / name, base_model=str(folder))
        with pytest.raises(AdapterError, match="no weight of the base"):
            merge(folder, tmp_path / name, tmp_path / "m", device="cpu")
        with pytest.raises(AdapterError, match="cannot be merged"):
            adapter.merge_delta(adapter.module_names[0])
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_virtual_tokens": 4}))
        with pytest.raises(FormatError, match="num_virtual_tokens"):
            read_adapter(tmp_path / name)


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_in_host_memory(name):
    ends = []
    for on_host in (False, True):
        model = tiny_models.build("llama").requires_grad_(False)
        if on_host:
            keep_embeddings_on_host(model)
        attach(model, CONFIGS[name], seed=3)
        ends.append(answer(model))
    assert torch.equal(*ends)
