"""Adapter configurations: what is refused, and which module gets which rank and scale."""

import subprocess
import sys
from importlib import import_module

import pytest

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.lora.config import DoRA, LoRA, LoRAFA
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.registry import METHODS, make_adapter_config, method_name
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.core.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"init": "zeros"}, "one of kaiming, gaussian, pissa, loftq"),
        ({"dtype": "int8"}, "float32, bfloat16 or float16"),
    ],
)
def test_values_that_cannot_train_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**fields)


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_the_shared_fields_and_their_name(method):
    patterns = {} if method == "adalora" else {"v_proj": 2}  # which starts with equal ranks
    fields = LoRA(rank=3, alpha=5, targets=("q_proj",), rank_pattern=patterns)
    made = make_adapter_config(method, fields)
    assert method_name(made) == method
    assert (made.rank, made.alpha, made.targets) == (3, 5, ("q_proj",))
    assert made.rank_of("layers.0.v_proj") == patterns.get("v_proj", 3)
    assert made.freeze_a == isinstance(made, LoRAFA)


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'lora_fa'"):
        make_adapter_config("lorafa", LoRA())
    with pytest.raises(ConfigError, match="known: lora, rslora, lora_fa, dora, "):
        make_adapter_config("xyz", LoRA())


def test_the_first_matching_pattern_counts():
    config = LoRA(rank=8, alpha=8, rank_pattern={"re:.*0.*": 2, "q_proj": 4}, rslora=True)
    assert config.rank_of("layers.0.q_proj") == 2
    assert config.rank_of("layers.1.q_proj") == 4
    assert config.rank_of("layers.1.v_proj") == 8
    assert config.scale_of("layers.1.q_proj") == 4.0


BUDGET = RankBudget()
ADALORA = (
    f"rank {AdaLoRA().rank} → {AdaLoRA().target_rank} on average, γ {BUDGET.orthogonality}, "
    f"β₁ = β₂ = {BUDGET.beta1}, ΔT {BUDGET.every}."
)
TEXTS = {
    "adapters.lora.layer": (f"rank {LoRA().rank}, alpha {LoRA().alpha:g}", "2106.09685"),
    "adapters.lora.dora": (f"rank {DoRA().rank} and alpha {DoRA().alpha:g}", "2402.09353"),
    "adapters.lora.pissa": (f"rank {LoRA().rank} and alpha {LoRA().alpha:g}", "2404.02948"),
    "adapters.lora.loftq": (f"rank {LoRA().rank} and alpha {LoRA().alpha:g}", "2310.08659"),
    "adapters.lora.sliced": (f"rank {LoRA().rank} and alpha {LoRA().alpha:g}", "2106.09685"),
    "adapters.lora.embedding": (f"rank {LoRA().rank} and alpha {LoRA().alpha:g}", "2106.09685"),
    "train.update": ("a ratio of one, the default", "2402.12354"),
    "optim.corrected": ("Default: off", "2308.03303"),
    "adapters.adalora.layer": (ADALORA, "2303.10512"),
    "adapters.glora.layer": (f"rank {GLoRA().rank}, `{GLoRA().structure}`", "2306.07967"),
    "adapters.bottleneck.layer": (
        f"{Bottleneck().kind}, reduction {Bottleneck().reduction}",
        "1902.00751",
    ),
    "adapters.prompt.prefix_tuning": (
        f"l = {PrefixTuning().length}, k = {PrefixTuning().hidden}",
        "2101.00190",
    ),
    "adapters.prompt.prompt_tuning": (f"l = {PromptTuning().length}", "2104.08691"),
    "adapters.selective.bitfit": (f"{BitFit().dtype} masters", "2106.10199"),
    "adapters.selective.top_k": ("two blocks and the final norm", "2106.09685"),
    "adapters.selective.full": (f"{Full().dtype} masters", "2106.09685"),
}
"""Where a method is stated: its defaults as its text has them, and the paper."""


@pytest.mark.parametrize("module", TEXTS)
def test_texts_have_the_statement_the_defaults_and_the_source(module):
    defaults, paper = TEXTS[module]
    text = import_module(f"qlora_kit.{module}").__doc__
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    assert any(defaults in part and "efault" in part for part in paragraphs), paragraphs
    assert f"arXiv:{paper}" in text
    assert (TopK().blocks, LoRA().lr_ratio_b, LoRA().corrected_gradient) == (2, 1.0, False)
    assert make_adapter_config("adalora", LoRA()).target_rank == 10  # of a run, from 16
    assert len(paragraphs) > 2  # what it is, beside its first line


def test_configurations_import_neither_torch_nor_transformers():
    code = (
        "import sys, qlora_kit.adapters.registry;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
