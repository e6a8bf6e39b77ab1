"""One module under several adapters: what model code reads of it, copies, and their sums."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.inject import load_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.multi_adapter.batch_rows import BatchRows
from qlora_kit.adapters.multi_adapter.combine import combined_pair, combined_values
from qlora_kit.adapters.multi_adapter.load import load_adapters
from qlora_kit.adapters.multi_adapter.pieces import HeldPair, SharedEmbedding, SharedLinear
from qlora_kit.core.errors import AdapterError
from tests import tiny_models
from tests.adapters.bases import LINEARS, make_linear
from tests.adapters.multi_adapter.helpers import alone, answer, base, folders, make, tolerance


def pair(r: int, k: int, n: int) -> LowRank:
    return LowRank(torch.randn(r, k), torch.randn(n, r), 0.7)


@pytest.mark.parametrize("kind", LINEARS)
def test_every_linear(kind):
    torch.manual_seed(0)
    linear, weight = make_linear(kind)
    shared = SharedLinear(linear, "proj")
    assert shared.weight is linear.weight
    assert shared.bias is linear.bias
    assert (shared.out_features, shared.in_features) == weight.shape
    assert shared.trainable() == {}
    pairs = {name: pair(r, 96, 80) for name, r in (("a", 4), ("b", 7))}
    for name, one in pairs.items():
        shared.hold(name, HeldPair(one, torch.device("cpu")))
    x = torch.randn(3, 5, 96)
    plain = x.double() @ weight.T + linear.bias.double()
    for name, one in pairs.items():
        shared.choose(name)
        wanted = plain + x.double() @ (0.7 * one.a.double().T @ one.b.double().T)
        assert (shared(x) - wanted).abs().max() < tolerance(wanted)
        assert (shared(x) - plain).abs().max() > 1.0
        torch.testing.assert_close(shared.merge_delta(), one.delta())
    shared.choose(BatchRows(["a", None, "b"]))
    with pytest.raises(AdapterError, match="no single change"):
        shared.merge_delta()
    shared.choose("unknown")
    assert shared.merge_delta() is None
    assert torch.equal(shared(x), linear(x))


def test_a_gradient_reaches_the_input_of_mixed_rows():
    """Nothing is trained here, but prompts before the model may be."""
    torch.manual_seed(0)
    shared = SharedLinear(nn.Linear(8, 6).requires_grad_(False), "proj")
    one = pair(2, 8, 6)
    shared.hold("a", HeldPair(one, torch.device("cpu")))
    for form in ("masked", "grouped"):
        shared.choose(BatchRows(["a", None], form=form))
        x = torch.randn(2, 3, 8, requires_grad=True)
        shared(x).sum().backward()
        change = torch.stack([shared.weight + one.delta(), shared.weight]).sum(1)
        torch.testing.assert_close(x.grad, change[:, None].expand(2, 3, 8))


def test_an_embedding_is_read_like_one():
    table = nn.Embedding(10, 4, padding_idx=3)
    shared = SharedEmbedding(table, "embed")
    assert shared.weight is table.weight
    assert shared.padding_idx == 3


@pytest.mark.parametrize("bits", [4, 32])
def test_an_embedding_trained_whole_beside_others(bits, tmp_path):
    model = base("llama", bits)
    found = {"whole": LoRA(rank=2, train_modules=("embed_tokens",)), "low": LoRA(rank=2)}
    paths = folders(model, found, tmp_path)
    bank = load_adapters(model, paths)
    bank.use("whole")
    one = answer(model)
    assert torch.equal(one, alone("llama", paths["whole"], bits))
    bank.use("low")
    other = answer(model)
    with bank.rows(["low", "whole"]):
        mixed = answer(model)
    limit = tolerance(one)
    assert (mixed[0] - other[0]).abs().max() < limit
    assert (mixed[1] - one[1]).abs().max() < limit
    assert (one - other).abs().max() > 100 * limit

    bank.combine("part", {"whole": 0.25, "low": 3.0})
    bank.save("part", tmp_path / "part")
    key = "model.embed_tokens.weight"
    trained, start = read_adapter(paths["whole"]).modules[key], model.model.embed_tokens.base.weight
    found = read_adapter(tmp_path / "part").modules[key]
    torch.testing.assert_close(found, start + 0.25 * (trained - start))
    bank.use("part")
    part = answer(model)
    bank.remove("part")
    bank.detach_from_model()
    load_adapter(model, tmp_path / "part")
    assert torch.equal(answer(model), part)


def test_a_head_of_other_classes_is_refused(tmp_path):
    many = make(tiny_models.build("bert", num_labels=5), LoRA(rank=2), tmp_path / "many", 0)
    with pytest.raises(AdapterError, match=r"classifier is saved with .*\(5,\).*has .*\(3,\)"):
        load_adapters(base("bert"), {"many": many})


def test_counters_are_not_summed():
    parts = [(0.5, {"seen": torch.tensor(3)}), (0.5, {"seen": torch.tensor(9)})]
    found = combined_values(parts, {"seen": torch.tensor(0)}, place="norm", new=False)
    assert found["seen"] == 3


def test_one_part_keeps_its_tensors():
    one = pair(2, 8, 6)
    half = combined_pair([(0.5, one)])
    assert half.a is one.a
    assert half.b is one.b
    assert half.scale == 0.35


def test_gpt2s_linears_have_no_other_attributes():
    """Code that reads a Conv1D's `weight` reads it as stored, (in, out)."""
    assert SharedLinear(Conv1D(6, 4), "proj").weight.shape == (4, 6)
