"""The amplification table: hand-made changes, chunks and layouts, and real checkpoints."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.formats.peft import AdapterFiles, read_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.analysis.amplification import Amplification, amplification, amplification_table
from qlora_kit.analysis.directions import Directions, decompose
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.errors import AdapterError, FormatError, ShapeError
from qlora_kit.export import rows as export_rows
from qlora_kit.export.quantized import save_quantized
from qlora_kit.export.rows import InMemory
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models
from tests.analysis.helpers import FLOAT32_EPS, peft_adapter, peft_delta, random_pair, rotation

VALUES = torch.tensor([10.0, 8.0, 5.0, 2.0, 1.0, 0.5], dtype=torch.float64)


def hand_made(out: int, in_: int) -> tuple[torch.Tensor, Directions]:
    """W of known singular values; ΔW of norm 5 on W's fourth and fifth directions."""
    u, v = rotation(out, 1)[:, :6], rotation(in_, 2)[:, :6]
    weight = (u @ VALUES.diag() @ v.T).float()
    change = Directions(u[:, 3:5], torch.tensor([4.0, 3.0], dtype=torch.float64), v[:, 3:5])
    return weight, change


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk", [1 << 22, 40])
def test_hand_made_change(shape, transposed, chunk, monkeypatch):
    """‖UᵀWV‖ = √(2² + 1²), W's own √(10² + 8²), the factor 5/√5; in one chunk and in many."""
    monkeypatch.setattr(export_rows, "CHUNK_WEIGHTS", chunk)
    weight, change = hand_made(*shape)
    found = amplification(weight.T if transposed else weight, change, transposed=transposed)
    # float32 weights, products and a Gram matrix: its error is ε·σ₁² on squares
    bound = 16 * max(shape) * FLOAT32_EPS
    assert found.shape == shape
    assert found.by_delta == pytest.approx((2.0, math.sqrt(5)), rel=bound * 10)
    assert found.by_weight == pytest.approx((10.0, math.sqrt(164)), rel=bound)
    assert found.weight_norm == pytest.approx(float(VALUES.norm()), rel=bound)
    assert found.factor == pytest.approx(math.sqrt(5), rel=bound * 10)
    assert found.factors == pytest.approx((4 / 2, math.sqrt(5)), rel=bound * 10)
    # wrong: U and V exchanged, and a change on W's first directions
    if shape[0] == shape[1]:
        turned = Directions(change.right, change.values, change.left)
        assert amplification(weight, turned).factor != pytest.approx(math.sqrt(5), rel=0.1)
    u, v = rotation(shape[0], 1), rotation(shape[1], 2)
    strong = amplification(weight, Directions(u[:, :2], change.values, v[:, :2]))
    assert strong.factor == pytest.approx(5 / math.sqrt(164), rel=bound)


def test_random_directions_hold_their_share():
    """The mean square over draws is ‖W‖²r²/(o·i), within five standard errors."""
    weight, change = hand_made(16, 20)
    found = [amplification(weight, change, seed=seed) for seed in range(200)]
    squares = torch.tensor([one.by_random[-1] ** 2 for one in found])
    error = 5 * float(squares.std()) / len(found) ** 0.5
    expected = found[0].expected_random
    assert expected == pytest.approx(float(VALUES.norm()) * 2 / math.sqrt(320), rel=1e-5)
    assert abs(float(squares.mean()) - expected**2) < error
    assert abs(float(squares.mean()) - (2 * expected) ** 2) > error  # the bound bites
    assert abs(float(squares.mean()) - float(VALUES.square().sum()) * 2 / 320) > error  # r, not r²


def test_nothing_is_read_twice_or_whole(monkeypatch):
    """Every row once, a chunk at a time."""
    monkeypatch.setattr(export_rows, "CHUNK_WEIGHTS", 24)
    weight, change = hand_made(30, 12)
    reads = []

    class Watched(InMemory):
        def read(self, start: int, stop: int) -> torch.Tensor:
            reads.append((start, stop))
            return super().read(start, stop)

    amplification(Watched(weight), change)
    assert reads == [(n, n + 2) for n in range(0, 30, 2)]


def test_a_change_of_nothing_has_no_factor():
    weight, _ = hand_made(12, 8)
    nothing = Directions(torch.zeros(12, 0), torch.zeros(0), torch.zeros(8, 0))
    found = amplification(weight, nothing)
    assert (found.rank, found.factor, found.by_delta) == (0, None, ())


def test_shapes_must_agree():
    weight, change = hand_made(12, 8)
    with pytest.raises(ShapeError, match=r"W is \(8, 12\)"):
        amplification(weight.T, change)


def dense_factor(weight: torch.Tensor, delta: torch.Tensor, rank: int) -> tuple[float, float]:
    """‖UᵀWV‖ and W's own by the dense formulas, float64; both (out, in)."""
    u, _, v = torch.linalg.svd(delta.double(), full_matrices=False)
    projected = (u[:, :rank].T @ weight.double() @ v[:rank].T).norm()
    own = torch.linalg.svdvals(weight.double())[:rank].norm()
    return float(projected), float(own)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("into", ["quantized", "original"])
def test_pefts_adapter_on_a_checkpoint(family, into, tmp_path, caplog):
    """Every line against PEFT's own ΔW and the weight of a loaded model, NF4 or not."""
    base = tiny_models.saved(family)
    names = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}[family]
    peft = peft_adapter(base, tmp_path / "adapter", rank=3, seed=1, target_modules=names)
    files = read_adapter(tmp_path / "adapter")
    quant = QuantConfig() if into == "quantized" else None
    caplog.set_level("INFO", logger="qlora_kit")
    model, _ = load(base, quant=quant, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lines = list(amplification_table(open_source(base), files, into=into))
    assert len(lines) == 2 * tiny_models.LAYERS
    assert ("NF4 with blocks of 64" in caplog.text) == (into == "quantized")  # assumed, and said
    for line in lines:
        delta = peft_delta(peft, line.module)
        module = model.get_submodule(line.module)
        weight = module.dequantize(torch.float32) if quant else module.weight
        if family == "gpt2" and not quant:
            weight = weight.T
        projected, own = dense_factor(weight.detach(), delta, 3)
        bound = 16 * max(line.shape) * FLOAT32_EPS
        # products of length n in float32, and PEFT's own ΔW in float32: √n·ε of ‖W‖ each
        error = 4 * max(line.shape) ** 0.5 * FLOAT32_EPS * line.weight_norm
        assert line.by_delta[-1] == pytest.approx(projected, abs=error)
        assert line.by_weight[-1] == pytest.approx(own, rel=bound)
        assert line.delta_norm == pytest.approx(float(delta.norm()), rel=bound)
        if quant:  # the bound bites: the 16-bit weight is another one
            other = plain.get_submodule(line.module).weight.detach()
            other = other.T if family == "gpt2" else other
            assert abs(line.by_delta[-1] - dense_factor(other, delta, 3)[0]) > 10 * error


def test_a_base_stored_as_nf4(tmp_path):
    """The codes of a 4-bit checkpoint give what quantizing while reading gives."""
    base = tiny_models.saved("llama")
    peft_adapter(base, tmp_path / "adapter", rank=3, seed=1)
    files = read_adapter(tmp_path / "adapter")
    save_quantized(base, tmp_path / "nf4")
    once = list(amplification_table(open_source(tmp_path / "nf4"), files, modules=("q_proj",)))
    again = list(amplification_table(open_source(base), files, modules=("q_proj",)))
    assert [line.by_delta for line in once] == [
        pytest.approx(line.by_delta, rel=2.0**-7) for line in again
    ]
    assert len(once) == tiny_models.LAYERS
    with pytest.raises(FormatError, match="no original weights"):
        list(amplification_table(open_source(tmp_path / "nf4"), files, into="original"))


def test_what_does_not_fit_is_refused(tmp_path):
    source = open_source(tiny_models.saved("llama"))
    pair = random_pair(7, 9, 2)
    name = "model.layers.0.self_attn.q_proj"
    files = AdapterFiles(config=LoRA(), deltas={name: pair})
    with pytest.raises(AdapterError, match="another base"):
        list(amplification_table(source, files))
    with pytest.raises(AdapterError, match="no module that matches k_proj"):
        list(amplification_table(source, files, modules=("k_proj",)))
    assert decompose(pair).rank == 2


@pytest.mark.parametrize(
    ("rank", "projected", "random", "delta", "factor"),
    [(4, 0.32, 0.02, 6.91, 21.5), (64, 1.90, 0.33, 3.57, 1.9)],
)
def test_the_papers_table_7_follows_from_its_norms(rank, projected, random, delta, factor):
    """GPT-3's W_q of layer 48, ‖W‖ = 61.95, 12,288 wide: to the digits that were printed."""
    line = Amplification(
        module="h.48.q",
        shape=(12288, 12288),
        rank=rank,
        delta_norms=(delta,),
        weight_norm=61.95,
        by_delta=(projected,),
        by_weight=(),
        by_random=(),
    )
    assert line.factor == pytest.approx(factor, rel=0.005 / projected + 0.05 / factor)
    assert line.expected_random == pytest.approx(random, abs=0.01)
    assert line.delta_norm / random != pytest.approx(factor, rel=0.1)  # not over the random one
