"""Loading onto a GPU: quantized there, within bounded memory, to the same codes."""

import pytest
import torch

from qlora_kit.load.model import load
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import nf4_modules, weight_shapes
from tests import tiny_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_auto_means_the_gpu_in_bfloat16_with_the_codes_of_the_cpu(family):
    model, _ = load(tiny_models.saved(family))
    other, _ = load(tiny_models.saved(family), device="cpu")
    for name, module in nf4_modules(model):
        for leaf in weight_shapes(module):
            codes = module.get_parameter(leaf)
            assert codes.is_cuda
            assert torch.equal(codes.cpu(), other.get_submodule(name).get_parameter(leaf)), name
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floats == {torch.bfloat16}
    assert all(p.is_cuda for p in model.parameters())


def test_logits_are_those_of_the_decoded_weights():
    model, _ = load(tiny_models.saved("llama"), dtype="float32")
    dense = tiny_models.build("llama").cuda()
    with torch.no_grad():
        for name, module in nf4_modules(model):
            assert isinstance(module, NF4Linear)
            dense.get_submodule(name).weight.copy_(module.dequantize())
        ids = tiny_models.tokens().cuda()
        came, wanted = model(input_ids=ids).logits, dense(input_ids=ids).logits
    assert (came - wanted).norm() / wanted.norm() < 64 * torch.finfo(torch.float32).eps


def test_save_on_the_gpu_load_on_the_cpu(tmp_path):
    model, _ = load(tiny_models.saved("llama"))
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path, device="cpu", dtype="bfloat16")
    wanted = model.state_dict()
    assert all(torch.equal(v, wanted[name].cpu()) for name, v in again.state_dict().items())


def test_memory_on_the_gpu_while_loading(tmp_path):
    folder = tiny_models.save(
        "llama",
        tmp_path,
        dtype=torch.bfloat16,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=16,
        head_dim=128,
        max_shard_size="500MB",
    )
    load(tiny_models.saved("llama"))  # contexts and libraries first
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    model, _ = load(folder)
    grown = torch.cuda.max_memory_allocated() - start
    final = sum(p.nbytes for p in model.parameters())
    largest = 2 * 2048 * 8192
    # Quantizing one tensor holds it in float32 several times over; never two tensors.
    assert grown <= final + 12 * largest
