"""Plans of every method: what is trained is what `attach` trains, peaks are what was measured."""

import json
from dataclasses import replace
from functools import cache

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from benchmarks.harness.record import RESULTS
from qlora_kit.adapters.adalora.config import RankBudget
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.prompt.config import PrefixTuning
from qlora_kit.adapters.registry import METHODS, OTHERS
from qlora_kit.adapters.selective.config import Full
from qlora_kit.bench.shapes import config_of
from qlora_kit.core.units import GIB
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.nearest import nearest
from qlora_kit.plan.plan import plan
from qlora_kit.plan.predict import Prediction, predict
from qlora_kit.plan.setup import FULL, Setup
from tests.plan.shapes import planner

EVERY = [*METHODS, *OTHERS]
LEFT = 58 << 20
"""cuBLAS's workspaces that CUDA graphs before a row left in its process (docs/planner.md)."""


def tiny() -> PreTrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=64, num_hidden_layers=3, num_key_value_heads=1, **sizes)


def setup(method: str, **changes: object) -> Setup:
    return Setup(method=method, bits=16 if method == FULL else 4, batch=2, seq=128, **changes)


@pytest.mark.parametrize("method", EVERY)
def test_what_is_trained_is_what_attach_trains(method):
    made = predict(tiny(), setup(method), find_gpu("l4"))
    model = LlamaForCausalLM(tiny())
    asked = setup(method).adapter or Full()
    assert made.trained == attach(model, asked).num_trainable
    assert made.components["optimizer"] > 0
    assert made.peak_bytes == sum(made.components.values())


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("activations", ["save", "recompute_all"])
def test_every_method_recomputes(method, activations):
    """The step is traced with transformers' recomputation too, and what is kept shrinks."""
    asked = setup(method).with_tokens(seq=2048)  # or the update is the peak
    made = planner("8GiB").predict(replace(asked, activations=activations))
    kept = planner("8GiB").predict(replace(asked, activations="save"))
    held, most = (one.components.get("saved activations", 0) for one in (made, kept))
    assert held <= most if activations == "save" else held < most


@pytest.mark.parametrize("method", list(OTHERS))
def test_what_does_not_fit_has_near_settings_or_none(method):
    few = planner("900MiB")
    asked = setup(method).with_tokens(batch=4, seq=8192)
    assert not few.fits(asked)
    found = nearest(few, asked)
    assert all(few.budget.fits(one) for one in found)
    assert all(one.setup.method == method for one in found)
    assert found or method in ("full", "top_k")


def test_own_settings_count():
    """Those of the method, not of LoRA."""
    made = [plan(tiny(), adapter=a, seq=128, gpu="l4").run.trained for a in _sizes()]
    assert made[0] < made[1] != made[2]
    assert "bottleneck on 4 bits" in str(plan(tiny(), adapter=_sizes()[0], seq=128, gpu="l4"))


def _sizes() -> list[Bottleneck | PrefixTuning]:
    return [Bottleneck(width=2), Bottleneck(width=8), PrefixTuning(length=3, hidden=None)]


def test_a_prefix_attends_with_a_mask():
    """Keys and values are then held once per query head; without it they are not."""
    model = planner("8GiB")
    names = "prefix_tuning", "prompt_tuning"
    found = [model.predict(setup(name).with_tokens(seq=1024)) for name in names]
    saved = [one.components["saved activations"] for one in found]
    layers, heads, shared, width = 4, 16, 8, 64
    repeated = layers * 2 * (heads - shared) * 2 * 1024 * width * 2
    assert saved[0] - saved[1] > 0.7 * repeated  # a prompt's hidden states are longer


@cache
def measured() -> list[tuple[str, int, Prediction]]:
    """Name, peak and prediction of every method timed on a 1B shape."""
    record = json.loads((RESULTS / "methods" / "h200-20261122-db9e0a9.json").read_text())
    (told,) = (row for row in record["rows"] if row["what"] == "budget")
    cases = {case["name"]: case for case in told["cases"]}
    gpu, found = find_gpu("h200"), []
    for row in record["rows"]:
        if row["what"] == "speed" and row["shape"] == "Llama-3.2-1B":
            made = predict(config_of(row["shape"]), _setup_of(cases[row["method"]]), gpu)
            assert made.trained == row["trainable"]
            assert made.fused == row["fused"]
            found.append((row["method"], row["peak_bytes"], made))
    return found


def _setup_of(case: dict) -> Setup:
    def read(kind, values):
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    method, settings = case["method"], case["settings"] | case["timed"]
    kind = {"adalora": RankBudget, **OTHERS}.get(method)
    return Setup(
        method=method,
        bits=case["bits"],
        batch=4,
        seq=1024,
        optimizer="adamw_torch",
        growing_segments=True,
        shape=read(LoRA, settings["adapter"]) if "adapter" in settings else None,
        own=read(kind, settings[method]) if kind and method in settings else None,
    )


def wrong(predicted: int, peak: int) -> bool:
    """Beyond 0.5%, what was left in the process aside."""
    return not -0.005 * peak <= peak - predicted <= LEFT + 0.005 * peak


@pytest.mark.slow
def test_peaks_of_every_method_are_as_measured():
    found = measured()
    assert len(found) >= 20
    # full fine-tuning's, the only one without adapters, is predicted 1.0% too high
    assert [n for n, peak, made in found if wrong(made.peak_bytes, peak)] == ["full"]
    assert all(abs(made.peak_bytes / peak - 1) < 0.015 for _, peak, made in found)


@pytest.mark.slow
def test_a_wrong_count_would_be_seen():
    """A tenth of the activations more or less, or one method's plan for another's."""
    found = measured()
    for name, peak, made in found:
        if name == "full":
            continue
        tenth = made.components["saved activations"] // 10
        assert wrong(made.peak_bytes + tenth, peak)
        assert wrong(made.peak_bytes - tenth, peak)
    others = {name: made.peak_bytes for name, _, made in found}
    assert wrong(others["pfeiffer"], next(p for n, p, _ in found if n == "houlsby"))
    assert others["glora"] - others["lora"] > 2 * GIB


def test_a_mask_is_not_read_in_half():
    """An own code's attention with a mask is a product of all queries and keys."""
    model = planner("8GiB")
    short, long = (model.predict(setup("prefix_tuning").with_tokens(seq=n)) for n in (1024, 4096))
    assert long.seconds["attention"] > 8 * short.seconds["attention"]
