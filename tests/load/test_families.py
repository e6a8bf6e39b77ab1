"""Every supported family, end to end: checkpoint, load, forward, backward, save, load again.

On the CPU where it is compared with a dense model; test_gpu.py does so on a GPU.
"""

import pytest
import torch

from qlora_kit.load.model import load
from qlora_kit.nn.experts import PROJECTIONS, NF4Experts
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import nf4_modules
from tests import tiny_models

EPS = torch.finfo(torch.float32).eps
# Both sides multiply the same numbers; only the order of summation may differ (a transposed
# GPT-2 product, one expert at a time): a few roundings over the layers.
TOLERANCE = 16 * EPS

FAMILIES = [*tiny_models.FAMILIES]
LABELS = 3


def options(family):
    """How to load a family: encoders as classifiers, the rest as causal language models."""
    if family in tiny_models.ENCODERS:
        return {"task": "sequence_classification"}
    return {}


def built(family):
    return tiny_models.build(family, num_labels=LABELS if family in tiny_models.ENCODERS else None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Family to a sharded folder, made on first use."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            built(family).save_pretrained(folder, max_shard_size="100KB")
            assert len(list(folder.glob("*.safetensors"))) > 1
            made[family] = folder
        return made[family]

    return get


def with_decoded_weights(family, model):
    """The dense model, its weights replaced by what the NF4 ones decode to."""
    dense = built(family)
    with torch.no_grad():
        for name, module in nf4_modules(model):
            target = dense.get_submodule(name)
            if isinstance(module, NF4Linear):
                weight = module.dequantize()
                target.weight.copy_(weight.T if module.transposed else weight)
            else:
                for projection in PROJECTIONS:
                    target.get_parameter(projection).copy_(module.dequantize(projection))
    return dense


def run(model, ids):
    """Logits, and the gradient of a random functional of them in the embeddings."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * probe).sum().backward()
    return logits.detach(), embeds.grad


def relative_error(came, wanted):
    return ((came - wanted).norm() / wanted.norm()).item()


def swap_nibbles(model):
    with torch.no_grad():
        for _, module in nf4_modules(model):
            for name in PROJECTIONS if isinstance(module, NF4Experts) else ("weight",):
                packed = module.get_parameter(name)
                packed.copy_((packed >> 4) | (packed << 4))


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_decoded_weights(family, checkpoints):
    model, _ = load(checkpoints(family), device="cpu", **options(family))
    dense = with_decoded_weights(family, model)
    ids = tiny_models.tokens()
    logits, grad = run(model, ids)
    wanted, wanted_grad = run(dense, ids)
    assert relative_error(logits, wanted) < TOLERANCE
    assert relative_error(grad, wanted_grad) < TOLERANCE
    swap_nibbles(model)
    broken, broken_grad = run(model, ids)
    assert relative_error(broken, wanted) > 1e4 * TOLERANCE
    assert relative_error(broken_grad, wanted_grad) > 1e4 * TOLERANCE


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_close_to_the_original(family, checkpoints):
    """NF4 loses about 9% per weight; unrelated weights would differ by 140%."""
    model, _ = load(checkpoints(family), device="cpu", **options(family))
    dense = built(family)
    for name, module in nf4_modules(model):
        if isinstance(module, NF4Linear):
            weight = dense.get_submodule(name).weight
            pairs = [(module.dequantize(), weight.T if module.transposed else weight)]
        else:
            source = dense.get_submodule(name)
            pairs = [(module.dequantize(p), source.get_parameter(p)) for p in PROJECTIONS]
        for came, wanted in pairs:
            assert 0.05 < relative_error(came, wanted) < 0.15, name


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_but_the_linears_is_untouched(family, checkpoints):
    model, _ = load(checkpoints(family), device="cpu", **options(family))
    quantized = {name for name, _ in nf4_modules(model)}
    dense = dict(built(family).named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in quantized and leaf != "bias":
            assert parameter.dtype == torch.uint8
            assert not parameter.requires_grad
        else:
            assert torch.equal(parameter, dense[name]), name
            compared += 1
    assert quantized
    assert compared >= 5


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_keeps_every_bit(family, checkpoints, tmp_path):
    model, _ = load(checkpoints(family), **options(family))
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    for again in (
        load(tmp_path / "saved", **options(family))[0],
        type(model).from_pretrained(tmp_path / "saved"),  # without the package's own function
    ):
        state, wanted = again.state_dict(), model.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        ids = tiny_models.tokens().to(model.device)
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    model.save_pretrained(tmp_path / "twice", max_shard_size="50KB")
    for file in (tmp_path / "saved").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()
