"""Bases, adapters with random changes, and logits: shared by the tests of exports."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models

BF16_EPS = 2.0**-8
"""One rounding of a bfloat16 value, relative."""


def train_adapter(
    base: Path,
    folder: Path,
    *,
    task: str = "causal_lm",
    quant: QuantConfig | None = QuantConfig(),  # noqa: B008
    config: LoRA | None = None,
    dtype: str = "float32",
) -> torch.Tensor:
    """Save an adapter with a random, sizeable change; returns the unmerged model's logits."""
    options = {"num_labels": 3} if task == "sequence_classification" else {}
    model, _ = load(base, quant=quant, task=task, dtype=dtype, **options)
    adapter = attach(model, config or LoRA(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if not name.endswith("lora_A"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapter.save(folder, base_model=str(base))
    return logits(model)


def unmerged_logits(base: Path, folder: Path, *, quant: QuantConfig | None) -> torch.Tensor:
    """Logits of a base with the adapter attached, in float32."""
    model, _ = load(base, quant=quant, dtype="float32")
    load_adapter(model, folder)
    return logits(model)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of the model where it is, in float32 on the CPU."""
    ids = tiny_models.tokens(rows=3, length=9).to(model.device)
    with torch.no_grad():
        return model(input_ids=ids).logits.float().cpu()


def plain_logits(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32):
    """Logits of a folder in plain transformers; nothing may be missing or left over."""
    auto = AutoModelForMaskedLM if family in tiny_models.ENCODERS else AutoModelForCausalLM
    if family == "classifier":
        auto = AutoModelForSequenceClassification
    model, report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return logits(model.eval())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error, root mean square."""
    return ((got - expected).norm() / expected.norm()).item()


def wrong_scale(adapter: Path, factor: float = 2.0) -> None:
    """Double every change of an adapter folder."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= factor
    save_file(tensors, path)
