"""Adapter configurations: what is refused, and which module gets which rank and scale."""

import subprocess
import sys

import pytest

from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.adapters.registry import METHODS, make_adapter_config, method_name
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


def test_configurations_import_neither_torch_nor_transformers():
    code = (
        "import sys, qlora_kit.adapters.registry;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
