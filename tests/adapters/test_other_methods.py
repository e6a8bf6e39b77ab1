"""What holds for every method that is not like LoRA: start, gradients, state, files, removal."""

import copy
import json

import pytest
import torch
from torch import nn

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.formats.own import OWN_TYPE
from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.mergeable import why_not_merged
from qlora_kit.adapters.registry import OTHERS, make_adapter_config, method_name
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.block.install import why_not_fused
from qlora_kit.core.errors import AdapterError, ConfigError, FormatError
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import nf4_modules
from qlora_kit.train.checkpoints import restore_adapter
from tests import tiny_models
from tests.adapters.bases import F32_EPS, quantize

CONFIGS = {
    "bitfit": BitFit(),
    "houlsby": Bottleneck(width=4, init="zero"),
    "pfeiffer": Bottleneck(kind="pfeiffer", width=4, init="zero"),
    "lin": Bottleneck(kind="lin", width=4, init="zero"),
    "top_k": TopK(blocks=1),
    "full": Full(),
}
FAMILIES = ("llama", "gpt2", "bert", "roberta")
GRADIENT_ERROR = 2000 * F32_EPS  # roundings of two layers, forward and backward, 14 tokens


def cases(*bits: int) -> list[tuple[str, str, int]]:
    return [
        (family, name, b)
        for family in FAMILIES
        for name in CONFIGS
        for b in bits
        if not (name == "full" and b == 4)
    ]


def base_of(family: str, bits: int, **options) -> nn.Module:
    model = tiny_models.build(family, **options)
    return quantize(model) if bits == 4 else model


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.tokens()).logits


def shake(adapter, scale: float = 0.05) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


@pytest.mark.transformers_compat
@pytest.mark.parametrize(("family", "name", "bits"), cases(4, 16))
def test_from_start_to_removal(family, name, bits):
    model = base_of(family, bits)
    before, modules = answer(model), dict(model.named_modules())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}

    adapter = attach(model, CONFIGS[name], seed=3)
    torch.testing.assert_close(answer(model), before, rtol=0, atol=0)
    trained = {id(p) for p in adapter.parameters()}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert why_not_fused(model) is not None  # the step falls back to the model's own code

    model(tiny_models.tokens()).logits.square().mean().backward()
    assert adapter.without_gradient() == ()
    with adapter.disabled():
        assert torch.equal(answer(model), before)
    if name != "full":
        shake(adapter)
        after = answer(model)
        assert not torch.allclose(after, before, atol=1e-4)
        with adapter.disabled():
            assert torch.equal(answer(model), before)
        assert torch.equal(answer(model), after)

    with pytest.raises(AdapterError, match="already carries"):
        attach(copy.deepcopy(model), BitFit())
    adapter.detach_from_model()
    assert torch.equal(answer(model), before)
    now = dict(model.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[n] is module for n, module in modules.items())
    assert all(type(now[n]) is type(module) for n, module in modules.items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def exact(model: nn.Module) -> nn.Module:
    """The same model in float64, without any adapter or NF4: decoded weights in plain modules."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, NF4Linear):
            has_bias = module.bias is not None
            dense = nn.Linear(module.in_features, module.out_features, bias=has_bias)
            dense.weight = nn.Parameter(module.dequantize(torch.float32))
            if has_bias:
                dense.bias = nn.Parameter(module.bias.detach().clone())
            twin.set_submodule(name, dense)
    return twin.double()


@pytest.mark.parametrize(("family", "name", "bits"), cases(4, 16))
def test_gradients_of_the_models_own_tensors_against_float64(family, name, bits):
    """BitFit, top-k and full train what autograd on a float64 twin has a gradient for."""
    if isinstance(CONFIGS[name], Bottleneck):
        pytest.skip("has tensors of its own: bottleneck/test_layer.py")
    model = base_of(family, bits)
    twin = exact(model)
    if name == "bitfit":  # a zero bias where the twin has none
        for module in twin.modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=torch.float64))
    adapter = attach(model, CONFIGS[name])
    ids = tiny_models.tokens()
    model(ids).logits.square().mean().backward()
    twin(ids).logits.square().mean().backward()
    wanted = {key: p.grad for key, p in twin.named_parameters()}
    # a key's bias has no effect on a softmax: its gradient is zero but for rounding
    floor = 1e-3 * max(float(wanted[key].norm()) for key, _ in adapter.named_parameters())
    bites = []
    for key, parameter in adapter.named_parameters():
        truth, found = wanted[key], parameter.grad.double()
        if bits == 4 and family == "gpt2" and found.ndim == 2:
            found = found.T  # stored as a Conv1D, and the twin is an nn.Linear
        scale = max(float(truth.norm()), floor)
        assert float((found - truth).norm()) / scale < GRADIENT_ERROR, key
        bites.append(float((1.001 * found - truth).norm()) / scale > GRADIENT_ERROR)
    assert any(bites)


@pytest.mark.parametrize(("family", "name", "bits"), cases(4))
def test_files_go_round(family, name, bits, tmp_path):
    model = base_of(family, bits)
    adapter = attach(model, CONFIGS[name], seed=1)
    shake(adapter)
    wanted = answer(model)
    adapter.save(tmp_path / "a", base_model="models/base")

    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["format_version"]) == (OWN_TYPE, 1)
    files = read_adapter(tmp_path / "a")
    assert files.config == CONFIGS[name]
    assert files.base.path == "models/base"
    assert set(files.modules) == set(adapter.state_dict())

    fresh = base_of(family, bits)
    loaded = load_adapter(fresh, tmp_path / "a")
    assert torch.equal(answer(fresh), wanted)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in adapter.named_parameters()]
    with torch.no_grad():
        next(loaded.parameters()).add_(1.0)
    restore_adapter(loaded, tmp_path / "a")  # as a resumed run does
    assert torch.equal(answer(fresh), wanted)


def test_peft_refuses_the_files_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    model = base_of("llama", 16)
    attach(model, BitFit()).save(tmp_path / "a")
    with pytest.raises((KeyError, ValueError), match=OWN_TYPE):
        peft.PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path / "a")


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "full"])
def test_a_classifiers_head_is_trained_and_saved(name, tmp_path):
    model = base_of("roberta", 16, num_labels=3)
    adapter = attach(model, CONFIGS[name])
    names = [n for n, _ in adapter.named_parameters()]
    assert sum(n.startswith("classifier.") for n in names) == 4
    shake(adapter)
    wanted = answer(model)
    adapter.save(tmp_path / "a")
    files = read_adapter(tmp_path / "a")
    assert (files.task_type, files.module_names) == ("SEQ_CLS", ("classifier",))
    heads = [v.shape[0] for k, v in files.modules.items() if k.endswith(".weight")]
    assert heads[-1] == 3  # what tells the number of classes
    fresh = base_of("roberta", 16, num_labels=3)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(answer(fresh), wanted)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_pass_through_checkpointing(family, name):
    model = base_of(family, 16)
    adapter = attach(model, CONFIGS[name], seed=2)
    ids = tiny_models.tokens()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in adapter.named_parameters()}

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, found in gradients().items():
        torch.testing.assert_close(found, plain[key])


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "full"])
def test_on_a_bfloat16_base_the_masters_are_float32(name):
    model = quantize(tiny_models.build("llama", dtype=torch.bfloat16))
    before = answer(model)
    adapter = attach(model, CONFIGS[name])
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert answer(model).dtype == torch.bfloat16
    difference = (answer(model) - before).abs().max()
    assert difference <= 2.0**-6 * before.abs().max()  # norms in float32 round once less
    ids = tiny_models.tokens()
    model(ids, labels=ids).loss.backward()
    assert adapter.without_gradient() == ()


def test_methods_by_name():
    for name, kind in OTHERS.items():
        assert method_name(kind()) == name
        assert make_adapter_config(name, LoRA()) == kind()
    assert make_adapter_config("top_k", LoRA(), TopK(blocks=3)) == TopK(blocks=3)
    with pytest.raises(ConfigError, match="Did you mean 'bitfit'"):
        make_adapter_config("bitfi", LoRA())
    refused = {name for name, config in CONFIGS.items() if why_not_merged(config)}
    assert refused == {"houlsby", "pfeiffer", "lin", "full"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"method": "bitfat"}, "unknown method 'bitfat'"),
        ({"settings": {"add_bias": "auto"}}, "no setting 'add_bias'"),
    ],
)
def test_files_that_are_not_understood_are_refused(change, message, tmp_path):
    attach(base_of("llama", 16), BitFit()).save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FormatError, match=message):
        read_adapter(tmp_path / "a")


def test_another_models_files_are_refused_and_leave_no_trace(tmp_path):
    attach(base_of("llama", 16), TopK(blocks=1)).save(tmp_path / "a")
    other = base_of("gpt2", 16)
    before = answer(other)
    with pytest.raises(AdapterError, match="does not fit"):
        load_adapter(other, tmp_path / "a")
    assert torch.equal(answer(other), before)
    assert list(nf4_modules(other)) == []
    attach(other, BitFit())
