"""Which measurements training records as a CUDA graph: its rule, before a model is built."""

from functools import cache

import torch
from transformers import AutoModelForCausalLM

from qlora_kit.bench.shapes import config_of
from qlora_kit.plan.gpus import recorded_here


@cache
def most_recorded(model: str) -> int:
    """Up to how many tokens a batch is recorded, on this machine's GPU or an H100.

    Args:
        model: a shape's name; see `shapes.py`.

    Returns:
        Tokens.

    Example:
        >>> most_recorded("tiny")
        16384
    """
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config_of(model), dtype=torch.bfloat16)
    return recorded_here(outline)
