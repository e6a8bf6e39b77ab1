"""Loading onto a GPU: quantized there, within bounded memory, to the same codes."""

import pytest
import torch

from qlora_kit.checkpoint.upload import MOST_THREADS, SLOT_BYTES, Uploader, _Slot
from qlora_kit.core.memory import PeakMemory
from qlora_kit.load import hf_quantizer
from qlora_kit.load.finite import FiniteCheck
from qlora_kit.load.model import load
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import nf4_modules, weight_shapes
from qlora_kit.ops import jit
from qlora_kit.ops.nf4_quantize.op import quantize_weight
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


def everything(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


@pytest.mark.parametrize("stored", ["16-bit", "nf4"])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral", "qwen3_moe"])
def test_the_same_bytes_as_through_transformers_own_copies(family, stored, monkeypatch, tmp_path):
    folder = tiny_models.saved(family)
    if stored == "nf4":
        load(folder)[0].save_pretrained(tmp_path)
        folder = tmp_path
    came = everything(load(folder)[0])
    monkeypatch.setattr(hf_quantizer, "UPLOADED_TO", ())
    wanted = everything(load(folder)[0])
    assert [name for name, _ in came] == [name for name, _ in wanted]
    for (name, one), (_, two) in zip(came, wanted, strict=True):
        assert one.dtype == two.dtype, name
        assert one.device == two.device, name
        assert torch.equal(one, two), name


@pytest.mark.parametrize("waits", [True, False])
def test_a_buffer_waits_for_its_copy(waits, monkeypatch):
    """The stream is kept busy, so that a ring that did not wait would send later bytes."""
    if not waits:
        monkeypatch.setattr(_Slot, "wait", lambda slot: None)
    uploader = Uploader(torch.device("cuda"), slot_bytes=1 << 20, threads=1)
    wanted = torch.arange(16 << 17)  # 16 buffers of 1 MiB, no two alike
    uploader.upload(wanted[:10])  # buffers and event exist
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about 0.1 s
    came = uploader.upload(wanted)
    assert torch.equal(came.cpu(), wanted) == waits


@pytest.mark.parametrize("watched", [True, False])
def test_quantizing_does_not_wait_for_the_gpu(watched):
    uploader, check = Uploader(torch.device("cuda")), FiniteCheck()
    weight = torch.randn(512, 256).bfloat16()
    watch = check.watch("weight") if watched else None
    quantize_weight(uploader.upload(weight), watch=watch)  # compiles, makes tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = uploader.upload(weight)
        if watched:
            quantize_weight(value, watch=watch)
        else:
            with pytest.raises(RuntimeError, match="synchroniz"):
                quantize_weight(value)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert check.error() is None


def test_memory_while_loading(tmp_path):
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
    with PeakMemory() as host:
        model, _ = load(folder)
    grown = torch.cuda.max_memory_allocated() - start
    final = sum(p.nbytes for p in model.parameters())
    largest = 2 * 2048 * 8192
    # One tensor and its float32 scales; without our kernels, in float32 several times over.
    assert grown <= final + (2 if jit.is_available() else 12) * largest
    # The buffers. Not the 16-bit weights.
    buffers = 2 * MOST_THREADS * SLOT_BYTES
    assert host.growth_bytes <= buffers + 150e6
    assert 16 / 4.5 * final > buffers + 150e6  # the bound can fail
