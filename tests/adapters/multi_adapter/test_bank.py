"""Several adapters on one model: switched, combined, saved, side by side in one batch."""

import pytest
import torch
from torch import nn

import qlora_kit as qk
from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.multi_adapter.load import load_adapters
from qlora_kit.core.errors import AdapterError
from tests import tiny_models
from tests.adapters.bases import F32_EPS
from tests.adapters.multi_adapter.helpers import (
    FAMILIES,
    alone,
    answer,
    base,
    configs,
    dense,
    folders,
    make,
    tolerance,
    variants,
)


@pytest.mark.transformers_compat
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_switching_is_loading_one_at_a_time_bit_for_bit(family, bits, tmp_path):
    model = base(family, bits)
    paths = folders(model, configs(family), tmp_path)
    bank = load_adapters(model, paths)
    assert torch.equal(answer(model), alone(family, None, bits))
    answers = {}
    for name in ("all", "some", "half", "all"):
        bank.use(name)
        answers[name] = answer(model)
        assert torch.equal(answers[name], alone(family, paths[name], bits)), name
        with bank.disabled():
            assert torch.equal(answer(model), alone(family, None, bits))
    assert (answers["all"] - answers["some"]).abs().max() > 1e-2
    bank.use(None)
    assert torch.equal(answer(model), alone(family, None, bits))


@pytest.mark.parametrize("bits", [4, 16])
def test_switching_in_16_bits(bits, tmp_path):
    model = base("llama", bits, torch.bfloat16)
    paths = folders(model, configs("llama"), tmp_path)
    bank = load_adapters(model, paths)
    for name, path in paths.items():
        bank.use(name)
        assert torch.equal(answer(model), alone("llama", path, bits, torch.bfloat16)), name


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_a_lora_only_in_its_files(family, bits, tmp_path):
    model = base(family, bits)
    paths = folders(model, variants(family), tmp_path)
    bank = load_adapters(model, paths)
    for name, path in paths.items():
        bank.use(name)
        one = alone(family, path, bits)
        assert (answer(model) - one).abs().max() < tolerance(one), name
        assert (one - alone(family, None, bits)).abs().max() > 100 * tolerance(one), name


def test_a_matrix_that_adalora_left_without_rank_stays_plain(tmp_path):
    model = base("llama")
    bank = load_adapters(model, folders(model, {"one": variants("llama")["adalora"]}, tmp_path))
    assert bank.merge_delta("one", "model.layers.0.self_attn.q_proj") is None
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_no_trace_is_left_and_the_base_is_there_once(tmp_path):
    model = base("llama", 4)
    before, modules = answer(model), dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    paths = folders(model, configs("llama"), tmp_path)
    plain = sum(p.numel() * p.element_size() for p in model.parameters())
    bank = load_adapters(model, paths)
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == plain + bank.nbytes
    pairs = [pair for path in paths.values() for pair in read_adapter(path).deltas.values()]
    assert bank.nbytes == sum(t.numel() * t.element_size() for p in pairs for t in (p.a, p.b))

    bank.use("some")
    bank.remove("some")
    assert bank.active is None
    assert torch.equal(answer(model), before)
    with pytest.raises(AdapterError, match=r"no adapter 'some'.*There are: all, half"):
        bank.use("some")
    bank.add("again", paths["some"])
    bank.use("again")
    assert torch.equal(answer(model), alone("llama", paths["some"], 4))

    assert repr(bank).startswith("AdapterBank(all, half, again; again answers; 14 modules, ")
    bank.remove("all")
    bank.remove("half")
    assert repr(bank).startswith("AdapterBank(again; again answers; 4 modules, ")
    assert torch.equal(answer(model), alone("llama", paths["some"], 4))

    bank.detach_from_model()
    now = dict(model.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[name] is module for name, module in modules.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    attach(model, LoRA(rank=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_combination_is_the_sum_of_dense_changes(family, tmp_path):
    model = base(family)
    paths = folders(model, configs(family) | variants(family), tmp_path)
    bank = load_adapters(model, paths)
    weights = dict(zip(paths, (0.7, -0.3, 0.4, 0.1, 0.2, -1.1), strict=False))
    weights["all"] += 1 - sum(weights.values())  # or the classifier's head could not be averaged
    bank.combine("sum", weights)
    files = {name: read_adapter(path).deltas for name, path in paths.items()}
    places = {place for deltas in files.values() for place in deltas}
    for place in places:
        parts = [(w, files[n][place]) for n, w in weights.items() if place in files[n]]
        wanted = sum(w * dense(pair) for w, pair in parts)
        sizes = sum(abs(w * p.scale) * p.folded().b.abs() @ p.folded().a.abs() for w, p in parts)
        rank = sum(pair.a.shape[0] for _, pair in parts)
        bound = (rank + 2) * F32_EPS * sizes.double()
        found = bank.merge_delta("sum", place)
        assert ((found - wanted).abs() <= bound + 1e-30).all(), place
        crossed = sum(
            w * p.b.double() @ parts[0][1].a[:1].double().expand_as(p.a) for w, p in parts
        )
        assert not ((crossed - wanted).abs() <= bound).all(), place


def test_a_combination_answers_like_the_changed_weights(tmp_path):
    model = base("llama")
    paths = folders(model, configs("llama"), tmp_path)
    bank = load_adapters(model, paths)
    weights = {"all": 0.6, "some": -1.5, "half": 0.25}
    bank.combine("sum", weights)
    bank.use("sum")
    found = answer(model)
    dense_model = base("llama")
    for name, weight in weights.items():
        for place, pair in read_adapter(paths[name]).deltas.items():
            dense_model.get_submodule(place).weight.data += (weight * dense(pair)).float()
    wanted = answer(dense_model)
    assert (found - wanted).abs().max() < tolerance(wanted)
    bank.combine("wrong", weights | {"half": 0.3})
    bank.use("wrong")
    assert (answer(model) - wanted).abs().max() > 100 * tolerance(wanted)
    bank.combine("twice", {"all": 2.0})
    bank.combine("back", {"twice": 0.5})
    bank.use("back")
    assert torch.equal(answer(model), alone("llama", paths["all"]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_combination_merged_into_nf4_is_the_unmerged_one(family, tmp_path):
    source = tiny_models.save(family, tmp_path / "base")
    model, _ = qk.load(source, quant=qk.QuantConfig(), dtype="float32", device="cpu")
    bank = load_adapters(model, folders(model, configs(family), tmp_path))
    bank.combine("sum", {"all": 0.5, "some": 0.5, "half": -1.0})
    bank.save("sum", tmp_path / "sum")
    bank.use("sum")
    wanted = answer(model)
    qk.merge(source, tmp_path / "sum", tmp_path / "merged", dtype="float32", into="quantized")
    merged, _ = qk.load(tmp_path / "merged", quant=None, dtype="float32", device="cpu")
    assert (answer(merged) - wanted).abs().max() < tolerance(wanted)
    bank.use("all")
    assert (answer(merged) - answer(model)).abs().max() > 100 * tolerance(wanted)
    with pytest.raises(AdapterError, match="has an adapter attached"):
        qk.save_quantized(model, tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_combination_is_an_adapter_like_any_other(family, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = tiny_models.save(family, tmp_path / "base")
    model, _ = qk.load(source, quant=None, dtype="float32", device="cpu")
    paths = folders(model, configs(family), tmp_path)
    bank = load_adapters(model, paths)
    bank.combine("sum", {"all": 0.5, "some": 0.5, "half": -1.0})
    bank.save("sum", tmp_path / "sum", base_model=str(source))
    bank.use("sum")
    wanted = answer(model)
    bank.detach_from_model()

    adapter = load_adapter(model, tmp_path / "sum")
    assert torch.equal(answer(model), wanted)
    adapter.detach_from_model()
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "sum")
    assert (answer(theirs) - wanted).abs().max() < tolerance(wanted)
    qk.merge(source, tmp_path / "sum", tmp_path / "merged", dtype="float32", into="original")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (answer(merged) - wanted).abs().max() < tolerance(wanted)
    assert (answer(merged) - alone(family, None)).abs().max() > 100 * tolerance(wanted)


def test_saving_a_loaded_adapter_keeps_it(tmp_path):
    model = base("llama")
    paths = folders(model, configs("llama") | variants("llama"), tmp_path)
    bank = load_adapters(model, paths)
    for name in paths:
        bank.save(name, tmp_path / f"copy-{name}")
        old, new = read_adapter(paths[name]).deltas, read_adapter(tmp_path / f"copy-{name}").deltas
        for place, pair in new.items():
            torch.testing.assert_close(pair.delta(), old[place].delta(), rtol=1e-6, atol=0)


def test_heads_are_averaged_and_not_scaled(tmp_path):
    model = base("bert", 4)
    paths = folders(model, configs("bert"), tmp_path)
    bank = load_adapters(model, paths)
    bank.combine("mean", {"all": 0.25, "some": 0.75})
    values = [read_adapter(paths[name]).modules["classifier.weight"] for name in ("all", "some")]
    bank.save("mean", tmp_path / "mean")
    found = read_adapter(tmp_path / "mean").modules["classifier.weight"]
    torch.testing.assert_close(found, 0.25 * values[0] + 0.75 * values[1])
    with pytest.raises(AdapterError, match=r"classifier was trained from a random start.*got 1\.5"):
        bank.combine("more", {"all": 0.75, "some": 0.75})
    assert bank.names == ("all", "some", "half", "mean")


def test_what_cannot_stand_beside_others_is_refused(tmp_path):
    model = base("llama")
    good = make(model, LoRA(rank=2), tmp_path / "good", 0)
    dora = make(model, DoRA(rank=2), tmp_path / "dora", 0)
    with pytest.raises(AdapterError, match="is a DoRA: it divides"):
        load_adapters(model, {"good": good, "dora": dora})
    other = attach(model, qk.Bottleneck(width=2))
    other.save(tmp_path / "bottleneck")
    with pytest.raises(AdapterError, match="already carries"):
        load_adapters(model, {"good": good})
    other.detach_from_model()
    with pytest.raises(AdapterError, match="trained with bottleneck"):
        load_adapters(model, {"one": tmp_path / "bottleneck"})
    foreign = make(base("gpt2"), LoRA(rank=2), tmp_path / "foreign", 0)
    with pytest.raises(AdapterError, match=r"adapts transformer\.h\.0"):
        load_adapters(model, {"good": good, "foreign": foreign})
    head = make(base("bert"), LoRA(rank=2), tmp_path / "head", 0)
    masked = tiny_models.build("bert")
    with pytest.raises(AdapterError, match=r"saved with classifier.*which BertForMaskedLM does"):
        load_adapters(masked, {"head": head})
    bank = load_adapters(model, {"good": good})  # nothing was left behind
    with pytest.raises(AdapterError, match="needs a new name, got 'good'"):
        bank.add("good", good)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        load_adapter(model, good)
    for weights in ({}, {"good": 0.0}, {"good": float("nan")}):
        with pytest.raises(AdapterError, match="finite weights, not all 0"):
            bank.combine("sum", weights)


def test_a_module_trained_whole_and_a_low_rank_change_of_it(tmp_path):
    model = base("llama")
    whole = LoRA(rank=2, targets=("v_proj",), train_modules=("layers.0.mlp",))
    low = make(model, LoRA(rank=2, targets=("up_proj",)), tmp_path / "low", 0)
    whole = make(model, whole, tmp_path / "whole", 1)
    for first, second in ((low, whole), (whole, low)):
        bank = load_adapters(model, {"first": first})
        with pytest.raises(AdapterError, match="trained whole and another a low-rank change"):
            bank.add("second", second)
        assert bank.names == ("first",)
        bank.use("first")
        assert torch.equal(answer(model), alone("llama", first))
        bank.detach_from_model()
    assert torch.equal(answer(model), alone("llama", None))
