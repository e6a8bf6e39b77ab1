"""NF4Weight and its file layout, both ways with bitsandbytes."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_kit.core.errors import ConfigError, FormatError, ShapeError
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.format import STATE_SUFFIX, from_bnb_tensors, is_companion, to_bnb_tensors
from qlora_kit.quant.weight import NF4Weight
from tests.quant import by_bitsandbytes


def bnb_tensors(weight, double_quant):
    """What bitsandbytes writes, by suffix."""
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    stored = {f".{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"": packed, **stored}, state


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (3, 7), (33, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_file_bytes_equal_bitsandbytes(double_quant, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    theirs, state = bnb_tensors(weight, double_quant)
    ours = to_bnb_tensors(NF4Weight.quantize(weight, double_quant=double_quant))
    assert list(ours) == sorted(ours, key=list(ours).index)
    assert set(ours) == set(theirs)
    for suffix, tensor in theirs.items():
        assert ours[suffix].dtype == tensor.dtype, suffix
        assert ours[suffix].shape == tensor.shape, suffix
        assert torch.equal(ours[suffix], tensor), suffix
    read = from_bnb_tensors(theirs, name="w")
    assert torch.equal(read.dequantize(), by_bitsandbytes.decoded(theirs[""], state, dtype))


def test_other_storage_dtypes_are_read():
    weight = torch.randn(64, 64)
    packed, state = bnb.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16
    )
    tensors = {"": packed, **{f".{k}": v for k, v in state.as_dict(packed=True).items()}}
    read = from_bnb_tensors(tensors, name="w")
    assert torch.equal(read.packed, NF4Weight.quantize(weight).packed)


def broken_state(**changes):
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [4, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 1.0,
    }
    state.update(changes)
    text = json.dumps(state).encode()
    return {STATE_SUFFIX: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".absmax": None}, r"w: \.absmax missing"),
        ({"": None}, "the packed weight missing"),
        ({STATE_SUFFIX: None}, "not an NF4 weight"),
        (
            {STATE_SUFFIX: None, ".quant_state.bitsandbytes__fp4": torch.zeros(1)},
            "stored as fp4",
        ),
        ({STATE_SUFFIX: torch.tensor([255, 254], dtype=torch.uint8)}, "not JSON"),
        ({STATE_SUFFIX: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "JSON object"),
        (broken_state(quant_type="fp4"), "quant_type is 'fp4'"),
        (broken_state(blocksize=48), "blocksize is 48"),
        (broken_state(dtype="float64"), "dtype is 'float64'"),
        (broken_state(shape=[4, -64]), "shape is"),
        (broken_state(shape=None), "shape is None"),
        (broken_state(nested_blocksize=128), "nested_blocksize is 128"),
        (broken_state(nested_offset="x"), "nested_offset is 'x'"),
        (broken_state(shape=[8, 64]), "has 128 elements"),
        ({".quant_map": torch.linspace(-1, 1, 16)}, "not the NF4 map"),
        ({".nested_quant_map": torch.linspace(-1, 1, 256)}, "not the dynamic map"),
        ({".nested_absmax": torch.zeros(9)}, r"\.nested_absmax has 9 elements"),
        ({".absmax": torch.zeros(4)}, "needed uint8"),
    ],
)
def test_each_way_of_being_malformed_is_named(changes, message):
    tensors = to_bnb_tensors(NF4Weight.quantize(torch.randn(4, 64)))
    tensors.update(changes)
    tensors = {key: value for key, value in tensors.items() if value is not None}
    with pytest.raises(FormatError, match=message):
        from_bnb_tensors(tensors, name="w")


def test_stacked_experts_round_trip_and_select():
    weight = torch.randn(4, 32, 128, dtype=torch.bfloat16)
    stack = from_bnb_tensors(to_bnb_tensors(NF4Weight.quantize(weight)), name="experts")
    assert stack.shape == (4, 32, 128)
    whole = stack.dequantize()
    for expert in range(4):
        assert torch.equal(stack.select(expert).dequantize(), whole[expert])
    assert not torch.equal(stack.select(1).dequantize(), whole[0])


def test_select_refuses_what_has_no_experts():
    with pytest.raises(ShapeError, match="stacked experts"):
        NF4Weight.quantize(torch.randn(4, 64)).select(0)
    with pytest.raises(ShapeError, match="whole blocks"):
        NF4Weight.quantize(torch.randn(4, 3, 7)).select(0)


def test_tensors_that_do_not_belong_together_are_refused():
    weight = NF4Weight.quantize(torch.randn(4, 64))
    with pytest.raises(ShapeError, match="packed with 256 elements"):
        NF4Weight(
            packed=weight.packed,
            absmax=weight.absmax,
            nested_absmax=weight.nested_absmax,
            offset=weight.offset,
            shape=(8, 64),
            block_size=64,
            dtype=torch.float32,
        )


def test_storage_is_what_the_config_promises():
    config = QuantConfig()
    weight = NF4Weight.quantize(torch.randn(1024, 1024))
    # The mean of the scales is one float32 per tensor, on top of the promised bits.
    assert weight.nbytes - 4 == pytest.approx(1024 * 1024 * config.bits_per_weight / 8, abs=1)
    single = NF4Weight.quantize(torch.randn(1024, 1024), double_quant=False)
    bits = QuantConfig(double_quant=False).bits_per_weight
    assert single.nbytes == 1024 * 1024 * bits / 8
    assert weight.to("cpu").nbytes == weight.nbytes


def test_companions_are_told_from_weights():
    assert is_companion("a.weight.nested_absmax")
    assert is_companion("a.weight.quant_state.bitsandbytes__nf4")
    assert not is_companion("a.absmax_proj.weight")


def test_unsupported_block_sizes_are_refused():
    with pytest.raises(ConfigError, match="block_size must be one of"):
        QuantConfig(block_size=63)
