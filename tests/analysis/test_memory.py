"""The table of a checkpoint needs one weight's memory, however many there are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.adapters.formats.peft import AdapterFiles
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.analysis.amplification import amplification_table
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.memory import PeakMemory
from qlora_kit.core.units import MIB
from tests.analysis.helpers import random_pair

WIDTH, INNER, LAYERS = 512, 2048, 10
SHAPES = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Feed-forward weights of ten layers, 4 MiB each in float32."""
    folder = tmp_path_factory.mktemp("wide")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{n}.mlp.{kind}_proj.weight": torch.randn(shape, generator=generator)
        for n in range(LAYERS)
        for kind, shape in SHAPES.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adapter(*kinds: str) -> AdapterFiles:
    deltas = {
        f"model.layers.{n}.mlp.{kind}_proj": random_pair(*SHAPES[kind], 2)
        for n in range(LAYERS)
        for kind in kinds
    }
    return AdapterFiles(config=LoRA(rank=2), deltas=deltas)


@pytest.mark.slow
@pytest.mark.parametrize("into", ["original", "quantized"])
def test_peak_is_a_few_weights_not_all(checkpoint: Path, into: str):
    """30 weights of 4 MiB: the peak stays below a third of the 120 MiB that all of them take."""
    source, files = open_source(checkpoint), adapter(*SHAPES)
    list(amplification_table(source, adapter("down"), into=into))  # what libraries allocate once
    with PeakMemory(interval_s=0.002) as memory:
        lines = list(amplification_table(source, files, into=into))
    assert len(lines) == 3 * LAYERS
    assert memory.growth_bytes < 40 * MIB
    with PeakMemory(interval_s=0.002) as memory:  # the bound bites: all weights at once
        whole = [source.read(name) for name in source.tensors]
        assert len(whole) == 3 * LAYERS
    assert memory.growth_bytes > 80 * MIB
