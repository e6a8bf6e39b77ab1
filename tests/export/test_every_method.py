"""Every method that merges, in bfloat16: the exact merge rounded once, and the others' refusals."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import DoRA, LoRA, LoRAFA
from qlora_kit.adapters.mergeable import why_not_merged
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.registry import METHODS, OTHERS, method_name
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.core.errors import AdapterError
from qlora_kit.export.merge import merge
from qlora_kit.export.originals import original_weights
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models
from tests.export.models import BF16_EPS, error, logits, weights

MERGED: dict[str, tuple[str, Method]] = {
    "lora": ("llama", LoRA(rank=4)),
    "rslora": ("llama", LoRA(rank=4, alpha=16.0, rslora=True)),
    "lora_fa": ("llama", LoRAFA(rank=4)),
    "patterns": ("llama", LoRA(rank=4, rank_pattern={"v_proj": 2}, layers_to_transform=(1,))),
    "pissa": ("llama", LoRA(rank=4, init="pissa")),
    "loftq": ("llama", LoRA(rank=4, init="loftq")),
    "slices": ("gpt2", LoRA(rank=4, targets=("c_attn",), slices={"c_attn": ("q", "v")})),
    "embedding": ("llama", LoRA(rank=4, targets=("all-linear", "embed_tokens"))),
    "dora": ("gpt2", DoRA(rank=4)),
    "adalora": ("llama", AdaLoRA(rank=4)),
    "glora": ("llama", GLoRA(rank=2)),
    "bitfit": ("gpt2", BitFit()),
    "bitfit_added": ("llama", BitFit()),
    "top_k": ("gpt2", TopK(blocks=1)),
}
REFUSED: dict[str, tuple[Method, str]] = {
    "houlsby": (Bottleneck(width=4), "nonlinearity"),
    "pfeiffer": (Bottleneck(kind="pfeiffer", width=4), "nonlinearity"),
    "lin": (Bottleneck(kind="lin", width=4), "nonlinearity"),
    "prefix": (PrefixTuning(length=3, hidden=None), "positions of its own"),
    "infix": (PrefixTuning(length=3, hidden=None, place="infix"), "positions of its own"),
    "prompt": (PromptTuning(length=3), "positions of its own"),
    "prelayer": (PromptTuning(length=3, layers="all"), "positions of its own"),
    "super_net": (GLoRA(rank=2, super_net=True), "Search the best one first"),
}


def trained(base: Path, config: Method, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Save an adapter with random values; logits of the model with it, and of the base."""
    model, _ = load(base, quant=QuantConfig(), dtype="float32", device="cpu")
    before = logits(model)
    needs = isinstance(config, LoRA) and config.init == "loftq"
    adapter = attach(model, config, seed=2, originals=original_weights(base) if needs else None)
    generator = torch.Generator().manual_seed(5)
    size = 0.15 if isinstance(config, AdaLoRA) else 0.03  # a product of three
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(size * torch.randn(value.shape, generator=generator))
    adapter.save(folder, base_model=str(base))
    return logits(model), before


def test_no_method_is_forgotten() -> None:
    merged = {method_name(config) for _, config in MERGED.values()}
    refused = {method_name(config) for config, _ in REFUSED.values()}
    assert merged | refused | {"full"} == {*METHODS, *OTHERS}
    assert not any(why_not_merged(config) for _, config in MERGED.values())
    assert why_not_merged(Full()) == (
        "Full fine-tuning saves the whole model: there is nothing to merge."
    )


@pytest.mark.parametrize("name", MERGED)
def test_merged_is_unmerged_within_one_rounding(name: str, tmp_path: Path) -> None:
    """Every tensor is the float32 merge rounded once; logits follow; the base's do not."""
    family, config = MERGED[name]
    base = tiny_models.saved(family)
    wanted, before = trained(base, config, tmp_path / "a")
    for dtype in ("float32", "bfloat16"):
        merge(base, tmp_path / "a", tmp_path / dtype, dtype=dtype, device="cpu")
    exact, rounded = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(tensor.bfloat16(), rounded[n]) for n, tensor in exact.items())
    found = {
        dtype: logits(AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype=torch.float32))
        for dtype in ("float32", "bfloat16")
    }
    assert error(found["float32"], wanted) < 2e-5  # sums in another order
    assert error(found["bfloat16"], wanted) < 2 * BF16_EPS  # of all weights, once
    assert error(before, wanted) > 10 * BF16_EPS


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_merge_says_why(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    base = tiny_models.saved("llama")
    trained(base, config, tmp_path / "a")
    with pytest.raises(AdapterError, match=reason):
        merge(base, tmp_path / "a", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
