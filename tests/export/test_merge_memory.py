"""A merge holds less than its largest tensor, however large the model is."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_kit.adapters.formats.peft import AdapterFiles, LowRank, write_adapter
from qlora_kit.adapters.formats.peft_config import BaseInfo
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.checkpoint.tensor_file import TensorInfo
from qlora_kit.checkpoint.writer import ShardWriter
from qlora_kit.quant.config import QuantConfig

HIDDEN, INNER, VOCAB = 2048, 24576, 65536
MIB = 1024**2

CHILD = """
import json, sys
import torch
import transformers.models.llama.modeling_llama
from qlora_kit.core.memory import PeakMemory
from qlora_kit.export.merge import merge
torch.set_num_threads(1)
base, adapter, out, into, keep = sys.argv[1:]
with PeakMemory() as memory:
    if keep == "keep":
        from qlora_kit.checkpoint.source import open_source
        source = open_source(base)
        kept = [source.read(name) for name in source.tensors]
    merge(base, adapter, out, into=into, device="cpu")
print(json.dumps({"growth": memory.growth_bytes}))
"""


def write_others(root: Path, files: AdapterFiles, generator: torch.Generator) -> None:
    """The same changes as DoRA's and, of rank 4, as GLoRA's A and B."""
    lengths = {
        name: replace(pair, magnitude=torch.rand(pair.b.shape[0], generator=generator))
        for name, pair in files.deltas.items()
    }
    write_adapter(root / "dora", replace(files, config=DoRA(rank=16), deltas=lengths))
    supports = {
        f"{name}.{letter}_{key}": tensor
        for name, pair in files.deltas.items()
        for letter in "AB"
        for key, tensor in (("d", pair.b[:, :4].clone()), ("u", pair.a[:4].clone()))
    }
    structured = GLoRA(rank=4, structure="lora lora none none none")
    glora = replace(files, config=structured, deltas={}, modules=supports)
    write_adapter(root / "glora", glora)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, Path, int, int]:
    """A one-layer Llama of 0.9 GB with matrices of 100 to 270 MB, and an adapter for it."""
    root = tmp_path_factory.mktemp("large")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
        **{f"model.layers.0.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"},
    }
    infos = [TensorInfo(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    base = root / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    row = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    with ShardWriter(base, infos, 600_000_000) as writer:
        for info in infos:
            left = info.nbytes // 2
            while left:
                writer.write_part(info.name, row[:left])
                left -= min(left, row.numel())
    generator = torch.Generator().manual_seed(1)
    deltas = {
        name.removesuffix(".weight"): LowRank(
            torch.randn(16, shape[1], generator=generator),
            torch.randn(shape[0], 16, generator=generator),
            2.0,
        )
        for name, shape in shapes.items()
        if "_proj" in name
    }
    info = BaseInfo(path=str(base), quant=QuantConfig(), dtype="bfloat16", recorded=True)
    files = AdapterFiles(config=LoRA(rank=16, alpha=32.0), deltas=deltas, base=info)
    write_adapter(root / "adapter", files)
    write_others(root, files, generator)
    sizes = [info.nbytes for info in infos]
    return base, root / "adapter", max(sizes), sum(sizes)


def growth(large: tuple[Path, Path, int, int], out: Path, into: str, keep: str = "") -> int:
    """Peak growth of anonymous memory of a process that merges."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(large[0]), str(large[1]), str(out), into, keep],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["growth"])


@pytest.mark.parametrize("into", ["original", "quantized"])
def test_peak_memory_is_bounded_by_the_largest_tensor(large, tmp_path, into):
    bound = int(1.5 * large[2]) + 300 * MIB
    assert bound < large[3]  # holding the model would not pass
    peak = growth(large, tmp_path / "out", into)
    print(f"{into}: {peak / MIB:.0f} MiB of {bound / MIB:.0f}")
    assert peak < bound


@pytest.mark.parametrize("method", ["dora", "glora"])
def test_other_methods_are_bounded_too(large, tmp_path, method):
    """Both need whole rows of the base beside the change: a few rows at a time."""
    base, adapter, largest, total = large
    peak = growth((base, adapter.with_name(method), largest, total), tmp_path / "out", "quantized")
    assert peak < int(1.5 * largest) + 300 * MIB < total


@pytest.mark.slow
def test_the_measurement_notices_a_model_in_memory(large, tmp_path):
    peak = growth(large, tmp_path / "out", "original", keep="keep")
    assert peak > int(1.5 * large[2]) + 300 * MIB
