"""Adapter folders of every kind that can stand side by side, and answers of tiny models."""

from pathlib import Path

import torch
from torch import nn

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.adapters.lora.low_rank import LowRank
from tests import tiny_models
from tests.adapters.bases import F32_EPS, quantize

SOME = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj"), "bert": ("value",)}
FAMILIES = tuple(SOME)
LABELS = 3


def configs(family: str) -> dict[str, LoRA]:
    """Adapters that differ in rank, scale, places and dtype."""
    some = SOME[family]
    return {
        "all": LoRA(rank=4, alpha=6),
        "some": LoRA(rank=8, alpha=3, rslora=True, targets=some, rank_pattern={some[-1]: 3}),
        "half": LoRAFA(rank=2, alpha=2, dtype="bfloat16"),
    }


def variants(family: str) -> dict[str, LoRA]:
    """What is a LoRA only in its files."""
    found = {"adalora": AdaLoRA(rank=6, budget=RankBudget(target_rank=4)), "pissa": LoRA(rank=2)}
    found["pissa"] = LoRA(rank=2, init="pissa")
    if family == "llama":
        found["embedding"] = LoRA(rank=3, targets=("embed_tokens", "v_proj"))
    if family == "gpt2":
        found["slices"] = LoRA(rank=2, targets=("c_attn",), slices={"c_attn": ("q", "v")})
    return found


def base(family: str, bits: int = 32, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same tiny model for the same arguments."""
    model = tiny_models.build(family, dtype=dtype, num_labels=LABELS if family == "bert" else None)
    return quantize(model) if bits == 4 else model


def make(model: nn.Module, config: LoRA, folder: Path, seed: int) -> Path:
    """Save an adapter with random values; the model is left as it was."""
    adapter = attach(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in adapter.state_dict().items():
            if not name.endswith("lora_A") or isinstance(config, AdaLoRA):
                tensor += torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1
            if name.endswith("0.self_attn.q_proj.lora_E"):
                tensor.zero_()
    adapter.save(folder)
    adapter.detach_from_model()
    return folder


def folders(model: nn.Module, found: dict[str, LoRA], root: Path) -> dict[str, Path]:
    """A folder for each of several configurations."""
    numbered = enumerate(found.items())
    return {name: make(model, config, root / name, 10 + i) for i, (name, config) in numbered}


def answer(model: nn.Module, ids: torch.Tensor | None = None, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_models.tokens() if ids is None else ids, **inputs).logits


def alone(family: str, folder: Path | None, bits: int = 32, dtype=torch.float32) -> torch.Tensor:
    """What a fresh model answers with one adapter, or with none."""
    model = base(family, bits, dtype)
    if folder is not None:
        load_adapter(model, folder)
    return answer(model)


def tolerance(values: torch.Tensor) -> float:
    """Of the same sums in another order: 128 terms at most, errors of some ten layers.

    Rounding errors of a sum of n terms stay below n·eps/2 of the sum of their sizes, and
    in fact near √n; what is left is for sizes that cancel.
    """
    return 128 * F32_EPS * float(values.abs().max())


def dense(pair: LowRank) -> torch.Tensor:
    """s·B·A in float64."""
    pair = pair.folded()
    return pair.scale * (pair.b.double() @ pair.a.double())
