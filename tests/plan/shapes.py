"""Configurations that are traced in a tenth of a second and still need gigabytes."""

from transformers import LlamaConfig, PreTrainedConfig

from qlora_kit.plan.budget import Budget
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.search import Planner


def llama(layers: int = 4, width: int = 1024) -> PreTrainedConfig:
    """Few layers, wide enough that activations count in GiB at some thousand tokens."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=1 << 17,
    )


def planner(budget: str, *, layers: int = 4, gpu: str = "l4", host: str | None = None) -> Planner:
    return Planner(llama(layers), find_gpu(gpu), Budget.of(budget, host=host))
