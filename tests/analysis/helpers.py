"""Adapters whose directions are known, PEFT's own adapters, and small bases."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.formats.peft import AdapterFiles
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.low_rank import LowRank

FLOAT64_EPS = torch.finfo(torch.float64).eps
FLOAT32_EPS = torch.finfo(torch.float32).eps


def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def with_right(directions: Tensor, strengths: list[float], seed: int = 0) -> Tensor:
    """A of shape (r, d) whose right singular vectors are the columns of `directions` (d, r)."""
    values = torch.tensor(strengths, dtype=torch.float64)
    return rotation(len(strengths), seed) @ (values[:, None] * directions.T)


def adapter(**pairs: LowRank) -> AdapterFiles:
    """Files of an adapter on modules `h.0.<name>`."""
    return AdapterFiles(config=LoRA(), deltas={f"h.0.{name}": p for name, p in pairs.items()})


def random_pair(out: int, in_: int, rank: int, seed: int = 0) -> LowRank:
    """A change with random factors."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=generator) for s in ((rank, in_), (out, rank)))
    return LowRank(a, b, 0.5)


def peft_adapter(base: Path, folder: Path, *, rank: int, seed: int, **fields: object) -> PeftModel:
    """Let PEFT make an adapter with random changes and save it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    settings = {"r": rank, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    peft = get_peft_model(model, LoraConfig(**settings | {"task_type": "CAUSAL_LM"} | fields))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    peft.save_pretrained(folder)
    return peft


def peft_delta(peft: PeftModel, module: str) -> Tensor:
    """ΔW (out, in) as PEFT computes it; float64."""
    layer = peft.base_model.model.get_submodule(module)
    delta = layer.get_delta_weight("default").detach().double()
    return delta.T if layer.fan_in_fan_out else delta
