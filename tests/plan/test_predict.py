"""Predictions: every family and policy, against arithmetic and against real modules."""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import MODELS, SHAPES, TINY
from qlora_kit.block.policy import POLICIES
from qlora_kit.core.allocator import NAMES
from qlora_kit.core.errors import ConfigError
from qlora_kit.optim.create import FLAT_NAMES, make_flat_optimizer
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.outline import components, outline
from qlora_kit.plan.own_code import OwnCode
from qlora_kit.plan.predict import (
    FIXED_FRAGMENTS,
    FRAGMENTS,
    RECORDING,
    Prediction,
    predict,
    run_step,
)
from qlora_kit.plan.setup import Setup
from qlora_kit.plan.state import optimizer_bytes
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models

GPU = find_gpu("h100")
GIB = 1 << 30


@cache
def of_8b(**fields) -> Prediction:
    return predict(SHAPES["Llama-3.1-8B"], Setup(**fields), GPU)


def test_weights_and_scales_are_what_the_format_says():
    found = of_8b(batch=1, seq=512).components
    linears = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336)
    assert found["weights"] == linears // 2
    assert found["scales"] == pytest.approx(linears / 64 * (1 + 4 / 256), rel=2e-3)
    assert found["embeddings"] == found["head"] == 128256 * 4096 * 2
    assert found["adapters"] > 41_943_040 * 4


def test_the_saved_set_is_that_of_the_training_step():
    """x, h, q, attention's output, k, v, gate and up in 16 bits, and what LoRA needs."""
    short, long = of_8b(seq=4096), of_8b(seq=8192)
    grown = long.components["saved activations"] - short.components["saved activations"]
    per_token = grown / 4096 / 32
    plain = 2 * (4 * 4096 + 2 * 1024 + 2 * 14336)
    low_rank = 2 * 16 * (3 + 1 + 2 + 2 + 1)
    assert per_token == pytest.approx(plain + low_rank + 4 * 32, rel=0.01)
    assert per_token != pytest.approx(plain + 2 * 14336, rel=0.05), "the activation is kept too"


def test_policies_go_from_the_most_memory_to_the_least():
    peaks = [of_8b(batch=4, activations=policy).peak_bytes for policy in POLICIES]
    assert peaks == sorted(peaks, reverse=True)
    times = {policy: of_8b(batch=4, activations=policy).step_s for policy in POLICIES}
    assert times["save"] < times["recompute_mlp"] < times["recompute_all"]


def test_embeddings_on_the_host_are_pinned_there():
    """To the byte; the GPU reads them by itself, so that the step is recorded as it was."""
    usual, away = (of_8b(seq=512, embeddings_on_host=on_host) for on_host in (False, True))
    assert usual.recorded
    assert away.recorded
    assert away.host["embeddings"] == usual.components["embeddings"] == 128256 * 4096 * 2
    assert "embeddings" not in usual.host
    assert "embeddings" not in away.components
    assert away.peak_bytes == usual.peak_bytes - away.host["embeddings"]


def test_offloaded_layers_wait_on_the_host():
    kept = of_8b(batch=4, activations="offload")
    assert kept.host["checkpoints"] == 32 * 4 * 2048 * 4096 * 2
    assert "checkpoints" not in of_8b(batch=4, activations="recompute_all").host


def test_components_add_up_to_the_peak():
    found = of_8b(batch=4, activations="recompute_all")
    assert sum(found.components.values()) == found.peak_bytes < found.reserved_bytes
    assert found.tokens_per_s == pytest.approx(4 * 2048 / found.step_s)
    assert sum(found.seconds.values()) == pytest.approx(found.step_s)


def test_segments_that_do_not_grow_leave_more_fragments(monkeypatch: pytest.MonkeyPatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    usual = predict(SHAPES["Llama-3.1-8B"], Setup(batch=4), GPU)
    monkeypatch.setenv(NAMES[0], "expandable_segments:False")
    fixed = predict(SHAPES["Llama-3.1-8B"], Setup(batch=4), GPU)
    assert usual.peak_bytes == fixed.peak_bytes
    few, many = (one.reserved_bytes - one.peak_bytes for one in (usual, fixed))
    assert many == pytest.approx(few * FIXED_FRAGMENTS / FRAGMENTS, abs=6)  # rounded down
    monkeypatch.setenv(NAMES[0], "expandable_segments:True")
    assert Setup().growing_segments


def test_the_workspace_of_a_recorded_backward_is_not_there_in_the_forward():
    """Few tokens and all kept: the peak is the loss, and later where a layer is computed again."""
    for policy, passes in (("save", 1), ("recompute_all", 2)):
        model, setup = SHAPES["Llama-3.2-1B"], Setup(seq=512, activations=policy)
        with_graph = predict(model, setup, GPU)
        without = predict(model, replace(setup, graph=False), GPU)
        more = with_graph.components["libraries"] - without.components["libraries"]
        assert more == passes * RECORDING


@pytest.mark.parametrize("name", ["Gemma-3-1B", "Qwen3-8B", "tiny"])
@pytest.mark.parametrize("method", ["lora", "lora_fa", "adalora", "dora"])
def test_families_are_planned_as_fused(name: str, method: str):
    config = MODELS[name]
    found = predict(config, Setup(method=method, seq=256, activations="save"), GPU)
    less = predict(config, Setup(method=method, seq=256, activations="recompute_all"), GPU)
    assert found.fused
    assert less.peak_bytes < found.peak_bytes


@pytest.mark.parametrize("family", sorted(set(tiny_models.FAMILIES) - set(tiny_models.ENCODERS)))
def test_every_causal_family_can_be_planned(family: str):
    config = tiny_models.FAMILIES[family]()
    for activations in ("save", "recompute_all"):
        found = predict(config, Setup(rank=4, seq=32, activations=activations), GPU)
        assert found.peak_bytes > 0
        assert found.trained > 0


def test_full_fine_tuning_in_mixed_precision_is_sixteen_bytes_a_parameter():
    setup = Setup(method="full", bits=16, optimizer="adamw_torch_fused", step="eager", seq=128)
    found = predict(SHAPES["Llama-3.2-1B"], setup, GPU)
    assert found.peak_bytes / found.trained == pytest.approx(16, rel=0.15)
    half = predict(SHAPES["Llama-3.2-1B"], replace(setup, mixed=False), GPU)
    assert half.peak_bytes / half.trained == pytest.approx(8, rel=0.15)
    with pytest.raises(ConfigError, match="16-bit"):
        Setup(method="full", bits=4)


def test_adalora_has_scores_and_a_term_in_the_loss():
    """Two float32 values per trained one; P and Q of all layers side by side for the term."""
    lora, adalora = (of_8b(batch=4, method=method) for method in ("lora", "adalora"))
    assert adalora.fused
    scores = adalora.components["importance scores"]
    assert scores == pytest.approx(8 * adalora.trained, rel=0.01)
    assert "importance scores" not in lora.components
    more = adalora.peak_bytes - lora.peak_bytes
    assert scores < more < scores + 4.5 * adalora.trained
    assert 1.0 < adalora.step_s / lora.step_s < 1.05


def test_dora_keeps_outputs_and_takes_little_longer():
    """q, k and v as projected, the outputs of o and down: 14,336 columns of an 8B model."""
    lora, dora = (of_8b(batch=4, method=method) for method in ("lora", "dora"))
    assert dora.fused
    kept = 32 * 4 * 2048 * 2 * (6144 + 4096 + 4096)
    more = dora.components["saved activations"] - lora.components["saved activations"]
    assert more == pytest.approx(kept, rel=0.05)
    assert 1.03 < dora.step_s / lora.step_s < 1.2
    own = of_8b(batch=4, method="dora", step="eager")
    assert own.step_s > 1.3 * lora.step_s


def test_a_configuration_is_left_as_it_was():
    before = TINY.to_dict(), TINY._attn_implementation
    predict(TINY, Setup(rank=4, seq=32), GPU)
    assert (TINY.to_dict(), TINY._attn_implementation) == before


def test_accumulation_takes_time_and_keeps_gradients():
    once, twice = of_8b(batch=2), of_8b(batch=2, accumulation=2)
    kept = twice.peak_bytes - once.peak_bytes + once.components.get("gradients", 0)
    assert kept == pytest.approx(4 * 41_943_040, rel=0.01)  # float32, r 16 on all linears
    assert 1.9 < twice.step_s / once.step_s < 2


@pytest.mark.parametrize("bits", [4, 16])
def test_an_outline_holds_what_the_real_model_holds(bits: int):
    setup = Setup(rank=8, bits=bits, dtype="float32")
    made = outline(TINY, setup)
    quant = QuantConfig() if bits == 4 else None
    model = random_model(TINY, quant, device="cpu", dtype=torch.float32)
    attach(model, LoRA(rank=8))
    wanted = {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    found = {n: (p.shape, p.dtype, p.requires_grad) for n, p in made.model.named_parameters()}
    assert found == wanted
    sizes = [p.nbytes for p in model.parameters()] + [b.nbytes for b in model.buffers()]
    counted = sum(-(-size // 512) * 512 for size in sizes)
    assert sum(components(made).values()) == counted


@pytest.mark.parametrize("name", sorted(FLAT_NAMES))
def test_optimizer_state_has_the_size_of_the_real_one(name: str):
    sizes = [(300, 40), (5,), (64, 64), (4096,), (1000,)]
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    on_gpu, on_host = optimizer_bytes(parameters, name)
    if name.startswith("paged"):
        assert not on_gpu
    wanted, options = _kind(name)
    real = make_flat_optimizer([{"params": parameters}], wanted, options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    held = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for block in real.blocks
        for key, t in block.state.items()
        if isinstance(t, torch.Tensor) and t.numel() > 1 and "qmap" not in key
    }
    assert on_gpu + on_host == pytest.approx(sum(held.values()), abs=512 * len(held))


def _kind(name: str) -> tuple[type, dict[str, object]]:
    import bitsandbytes

    if name.startswith("adamw_torch"):
        return torch.optim.AdamW, {"lr": 0.1}
    bits = 32 if "32" in name else 8
    paged = name.startswith("paged")
    return bitsandbytes.optim.AdamW, {"lr": 0.1, "optim_bits": bits, "is_paged": paged}


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ConfigError, match="lion"):
        optimizer_bytes([], "lion_8bit")


def test_fused_layers_need_nothing_of_own_code():
    """What it would see of them, it leaves as it is: the same step, without being asked."""
    setup = Setup(rank=8, seq=256)
    traces = []
    for own_code in (None, OwnCode(setup)):
        made = outline(tiny_models.FAMILIES["llama"](), setup)
        assert isinstance(made.own_code, nullcontext)
        made.own_code = own_code or made.own_code
        traces.append(run_step(made, setup, GPU))
    without, under = traces
    assert without.peak_bytes() == under.peak_bytes() > 0
    assert without.seconds == under.seconds
    eager = outline(tiny_models.FAMILIES["llama"](), Setup(rank=8, seq=256, step="eager"))
    assert isinstance(eager.own_code, OwnCode)
