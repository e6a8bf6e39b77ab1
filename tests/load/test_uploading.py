"""Weights that we take to the GPU are the bytes that transformers would have taken there.

Both ways for every family, through both doors. A CPU stands in for the GPU: told to take weights
to a CPU, the package does everything that it does for a GPU but pin memory and wait.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qlora_kit.checkpoint.upload import Uploader
from qlora_kit.core.errors import FormatError, NonFiniteError
from qlora_kit.export.quantized import save_quantized
from qlora_kit.load import hf_quantizer
from qlora_kit.load.hf_quantizer import NF4Config
from qlora_kit.load.model import load
from qlora_kit.nn.swap import nf4_modules, weight_shapes
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models

pytestmark = pytest.mark.transformers_compat


@pytest.fixture
def uploading(monkeypatch):
    """Switch it on for the CPU, with buffers that tiny weights fill; gives what was uploaded."""
    uploaded = []

    class Small(Uploader):
        def __init__(self, device):
            super().__init__(device, slot_bytes=1024, threads=2)

        def upload(self, tensor):
            uploaded.append(tensor.shape)
            return super().upload(tensor)

    def switch(on=True, *, kind=Small):
        monkeypatch.setattr(hf_quantizer, "UPLOADED_TO", ("cpu",) if on else ())
        monkeypatch.setattr(hf_quantizer, "Uploader", kind)
        uploaded.clear()
        return uploaded

    return switch


def options(family):
    """Encoders are loaded as classifiers, the rest as causal language models."""
    return {"task": "sequence_classification"} if family in tiny_models.ENCODERS else {}


def folder_of(family, tmp_path):
    if family in tiny_models.ENCODERS:
        tiny_models.save(family, tmp_path / family, num_labels=3)
        return tmp_path / family
    return tiny_models.saved(family)


def everything(model):
    """Every parameter and buffer with what it is; tied ones under every name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def assert_same(came, wanted):
    one, two = everything(came), everything(wanted)
    assert list(one) == list(two)
    for name, tensor in two.items():
        found = one[name]
        assert (found.dtype, found.shape, found.device) == (
            tensor.dtype,
            tensor.shape,
            tensor.device,
        ), name
        assert found.requires_grad == tensor.requires_grad, name
        assert torch.equal(found, tensor), name
    for (name, a), (_, b) in zip(nf4_modules(came), nf4_modules(wanted), strict=True):
        kinds = [getattr(m, "weight_dtype", getattr(m, "weight_dtypes", None)) for m in (a, b)]
        assert kinds[0] == kinds[1], name


def count(model):
    return sum(len(weight_shapes(module)) for _, module in nf4_modules(model))


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES])
def test_the_same_bytes_both_ways(family, uploading, tmp_path):
    folder = folder_of(family, tmp_path)
    uploading(False)
    wanted, _ = load(folder, device="cpu", **options(family))
    uploaded = uploading()
    came, _ = load(folder, device="cpu", **options(family))
    assert len(uploaded) >= count(came)
    assert_same(came, wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "bert"])
def test_the_same_bytes_through_the_ecosystems_door(family, uploading, tmp_path):
    folder = folder_of(family, tmp_path)
    kind = AutoModelForCausalLM
    if family in tiny_models.ENCODERS:
        kind = AutoModelForSequenceClassification
    uploading(False)
    wanted = kind.from_pretrained(folder, quantization_config=NF4Config(), device_map="cpu")
    uploaded = uploading()
    came = kind.from_pretrained(folder, quantization_config=NF4Config(), device_map="cpu")
    assert len(uploaded) >= count(came)
    assert_same(came, wanted)
    assert came.hf_quantizer.uploader is None  # its memory is given back


@pytest.mark.parametrize("style", ["ours", "bitsandbytes"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", ["llama_tied", "phi3", "gpt2", "qwen3_moe", "bert"])
def test_a_stored_base_both_ways(family, double_quant, style, uploading, tmp_path):
    folder = folder_of(family, tmp_path)
    uploading(False)
    first, _ = load(
        folder, device="cpu", quant=QuantConfig(double_quant=double_quant), **options(family)
    )
    if style == "ours":
        first.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    else:
        save_quantized(first, tmp_path / "saved")
    wanted, _ = load(tmp_path / "saved", device="cpu", **options(family))
    uploaded = uploading()
    came, _ = load(tmp_path / "saved", device="cpu", **options(family))
    tensors = 4 if double_quant else 2
    assert len(uploaded) == tensors * count(came)
    assert_same(came, wanted)
    if style == "ours":  # the other one stores what is not quantized in bfloat16
        assert_same(came, first)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_another_compute_dtype_both_ways(family, stored, uploading):
    folder = tiny_models.saved(family, dtype=stored)
    uploading(False)
    wanted, _ = load(folder, device="cpu", dtype="bfloat16")
    uploading()
    came, _ = load(folder, device="cpu", dtype="bfloat16")
    assert_same(came, wanted)


def test_experts_that_stay_dense(uploading):
    config = QuantConfig(skip=("lm_head", r"re:.*layers\.0\.mlp\.experts"))
    uploading(False)
    wanted, _ = load(tiny_models.saved("mixtral"), quant=config, device="cpu")
    uploading()
    came, _ = load(tiny_models.saved("mixtral"), quant=config, device="cpu")
    assert_same(came, wanted)


def test_a_sixteen_bit_base_is_transformers_business(uploading):
    uploading(False)
    wanted, _ = load(tiny_models.saved("llama"), quant=None, device="cpu")
    uploaded = uploading()
    came, _ = load(tiny_models.saved("llama"), quant=None, device="cpu")
    assert not uploaded
    assert_same(came, wanted)


def test_a_wrong_byte_would_be_seen(uploading):
    """The comparison above bites."""

    class Wrong(Uploader):
        def _fill(self, buffer, part):
            super()._fill(buffer, part)
            buffer[:1] ^= 128

    uploading(False)
    wanted, _ = load(tiny_models.saved("llama"), device="cpu")
    uploading(kind=Wrong)
    came, _ = load(tiny_models.saved("llama"), device="cpu")
    with pytest.raises(AssertionError):
        assert_same(came, wanted)


def test_errors_are_the_same(uploading, tmp_path):
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
        model.model.layers[1].self_attn.q_proj.weight[0, :] = float("inf")
    model.save_pretrained(tmp_path / "nan")
    config = tiny_models.build("llama", intermediate_size=96)
    config.save_pretrained(tmp_path / "shape")
    tiny_models.build("llama").config.save_pretrained(tmp_path / "shape")
    for folder, kind in (("nan", NonFiniteError), ("shape", FormatError)):
        said = []
        for on in (False, True):
            uploading(on)
            with pytest.raises(kind) as caught:
                load(tmp_path / folder, device="cpu")
            said.append(str(caught.value))
        assert said[0] == said[1]
        if folder == "nan":
            assert "layers.1.mlp.up_proj.weight (1 of 128 blocks)" in said[0]
            assert "layers.1.self_attn.q_proj.weight (1 of 64 blocks)" in said[0]


@pytest.mark.parametrize(
    ("device_map", "device"),
    [
        ({"": 1}, "cuda:1"),
        ({"": "cuda"}, "cuda"),
        ({"": torch.device("cuda", 0)}, "cuda:0"),
        ({"": "cpu"}, None),
        ({"": "mps"}, None),
        ({"": "disk"}, None),
        ({"model": 0, "lm_head": 1}, None),
        ("auto", None),
        (None, None),
    ],
)
def test_which_maps_are_ours(device_map, device):
    """One GPU: us. Anything else: transformers."""
    made = hf_quantizer._uploader(device_map)
    assert (None if made is None else str(made.device)) == device


def test_kernels_compile_while_weights_come_in(uploading, monkeypatch):
    """For the device and the dtype of the model; transformers' own way begins nothing."""
    begun = []
    monkeypatch.setattr(hf_quantizer.precompile, "begin", lambda *what: begun.append(what))
    for on, expected in ((True, [(torch.device("cpu"), torch.float32)]), (False, [])):
        begun.clear()
        uploading(on)
        load(tiny_models.saved("llama"), dtype="float32", device="cpu")
        assert begun == expected
