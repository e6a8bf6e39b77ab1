"""Weights that are no numbers are refused together, when everything is loaded."""

import pytest
import torch

from qlora_kit.core.errors import NonFiniteError
from qlora_kit.load.finite import FiniteCheck
from qlora_kit.nn.experts import quantize_stack
from qlora_kit.ops.nf4_quantize.op import quantize_weight
from qlora_kit.quant.config import QuantConfig

BAD = [float("nan"), float("inf"), -float("inf")]


def matrix(seed=0):
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("double_quant", [True, False])
def test_watching_changes_no_bit(double_quant):
    plain = quantize_weight(matrix(), double_quant=double_quant)
    check = FiniteCheck()
    watched = quantize_weight(matrix(), double_quant=double_quant, watch=check.watch("w"))
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, watched.tensors()[name])
    assert check.error() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_a_broken_weight_is_found_and_others_are_not_blamed(bad, double_quant, dtype):
    check = FiniteCheck()
    for name in ("first", "second", "third"):
        weight = matrix().to(dtype)
        if name == "second":
            weight[3, 5] = weight[3, 6] = weight[7, 0] = bad
        quantize_weight(weight, double_quant=double_quant, watch=check.watch(name))
    error = check.error()
    assert isinstance(error, NonFiniteError)
    assert str(error).startswith("second (2 of 16 blocks): NaN or infinite values")
    assert "first" not in str(error)
    assert "third" not in str(error)


@pytest.mark.parametrize("bad", BAD)
def test_broken_experts_are_named(bad):
    check = FiniteCheck()
    experts = [matrix(seed) for seed in range(4)]
    quantize_stack(experts, QuantConfig(), watch=check.watch("whole", 4))
    assert check.error() is None
    experts[1][0, 0] = experts[3][15, 63] = bad
    quantize_stack(experts, QuantConfig(), watch=check.watch("stack", 4))
    assert str(check.error()).startswith("stack (expert 1, 3): NaN")


def test_many_broken_weights_make_a_short_message():
    check = FiniteCheck()
    for index in range(200):
        check.watch(f"layers.{index}.weight")(torch.tensor([float("nan")]))
    assert "and 196 more" in str(check.error())
    assert len(str(check.error())) < 500


def test_unwatched_weights_are_refused_at_once():
    weight = matrix()
    weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="holds 1 NaN"):
        quantize_weight(weight)
    with pytest.raises(NonFiniteError, match="expert 1"):
        quantize_stack([matrix(), weight], QuantConfig())
