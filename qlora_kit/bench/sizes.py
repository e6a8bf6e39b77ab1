"""Sizes from configurations alone: checkpoints, and QLoRA's published memory breakdown.

Models are built on the meta device, where tensors have shapes and no memory, quantized and
adapted by the very code that does it in training, and counted.

**Checkpoints.** LoRA's paper: GPT-3 in 16 bits is 350 GB, its adapter at r 4 on q and v 35 MB,
10,000 times less (arXiv:2106.09685, section 4.2).

**QLoRA's breakdown** (arXiv:2305.14314, figure 6) follows from the shapes, too; `EXPLAINED` says
how the published figures have to be read, and what is left.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.bench.shapes import GPT_3, LLAMA_1, SHAPES
from qlora_kit.core.units import GIB, MIB
from qlora_kit.nn.swap import quantizable, swap
from qlora_kit.quant.config import QuantConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A model and its adapter, counted."""

    parameters: int
    """Of the model, before it was quantized."""
    base_bytes: int
    """The frozen model as it is held: quantized linears, the rest in 16 bits."""
    adapter_parameters: int
    """Trained values of the adapter."""


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def count(config: PretrainedConfig, lora: LoRA, quant: QuantConfig | None) -> Counted:
    """Count a model with an adapter, without any memory.

    Args:
        config: of a causal language model.
        lora: the adapter.
        quant: how linears are stored; None for 16 bits.

    Returns:
        Parameters and bytes; tied weights once.

    Example:
        >>> count(SHAPES["Llama-3.1-8B"], LoRA(rank=16), None).adapter_parameters
        41943040
    """
    model = _meta_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    if quant is not None:
        swap(model, dict.fromkeys(quantizable(model, quant), quant), dtype=torch.bfloat16)
    base_bytes = sum(p.nbytes for p in model.parameters())
    adapter = attach(model, lora)
    trained = sum(p.numel() for _, p in adapter.named_parameters())
    return Counted(parameters=parameters, base_bytes=base_bytes, adapter_parameters=trained)


# Checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSize:
    """A model's checkpoint in 16 bits, and an adapter's."""

    model: str
    adapter: str
    """In words."""
    model_bytes: int
    """16 bits per parameter."""
    adapter_bytes: int
    """16 bits per trained value, as the paper counts; ours are saved in float32 unless asked
    otherwise, which is twice that."""

    @property
    def ratio(self) -> float:
        """How many times smaller the adapter is."""
        return self.model_bytes / self.adapter_bytes


def checkpoint_sizes() -> list[CheckpointSize]:
    """GPT-3 as in LoRA's paper, then public shapes: r 4 on q and v, r 16 on all linears.

    Returns:
        One entry per model and adapter.

    Example:
        >>> gpt3 = checkpoint_sizes()[0]
        >>> round(gpt3.model_bytes / 1e9), round(gpt3.adapter_bytes / 2**20), round(gpt3.ratio, -2)
        (349, 36, 9300.0)
    """
    small = LoRA(rank=4, alpha=8, targets=("q_proj", "v_proj"))
    cases = [("GPT-3", GPT_3, small, "r 4 on q, v")]
    for name, config in SHAPES.items():
        cases.append((name, config, small, "r 4 on q, v"))
        cases.append((name, config, LoRA(rank=16), "r 16 on all linears"))
    found = []
    for name, config, lora, words in cases:
        counted = count(config, lora, None)
        found.append(
            CheckpointSize(
                model=name,
                adapter=words,
                model_bytes=2 * counted.parameters,
                adapter_bytes=2 * counted.adapter_parameters,
            )
        )
    return found


# QLoRA's breakdown

PUBLISHED: dict[str, dict[str, int]] = {
    "7B": {"model": 5046, "adapters": 298, "optimizer": 1152},
    "13B": {"model": 8476, "adapters": 450, "optimizer": 1800},
    "33B": {"model": 19302, "adapters": 898, "optimizer": 3510},
    "65B": {"model": 37074, "adapters": 1440, "optimizer": 5760},
}
"""Figure 6 of arXiv:2305.14314, in its MB."""


EXPLAINED = """\
The published figures follow from the shapes within 7% if they are read as follows.

- MB are 2^20 bytes.
- Model: 4.5 bits per weight of the linears (a float32 scale per 64 weights: no double
  quantization), embeddings and head in 16 bits, and one GiB that is the same for all sizes; a
  CUDA context and what a process holds beside its model are of that size.
- Adapters: rank 64 on all seven linears, 16 bits.
- Optimizer: two float32 moments per adapter weight.

What is left: the published optimizer is 64 · 18 · hidden · 8 bytes per layer, to the last digit,
as if the feed-forward were two matrices four times as wide as the model (4 · 2 + 2 · 5 = 18).
LLaMA's is three of about 2.7 times: 19.06 to 19.08, hence 6% more. The same goes for the adapters
of 13B and 65B; those of 7B and 33B are published 3.5% and 2.3% larger than that.
"""
"""How the published breakdown is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the published figures are read."""

    double_quant: bool
    """Whether scales are quantized as well."""
    beside_bytes: int
    """Memory of the process that is counted with the model."""
    rank: int = 64
    adapter_bytes: int = 2
    """Per value."""
    optimizer_bytes: int = 8
    """Per value."""


PUBLISHED_AS = Reading(double_quant=False, beside_bytes=GIB)
"""The reading under which they follow from the shapes."""

OURS = Reading(double_quant=True, beside_bytes=0, adapter_bytes=4, optimizer_bytes=2)
"""The same model as we hold it: double quantization, float32 adapters, 8-bit AdamW."""


def breakdown(size: str, reading: Reading) -> dict[str, float]:
    """Memory of a LLaMA model under QLoRA.

    Args:
        size: a key of `PUBLISHED`.
        reading: what is counted and how.

    Returns:
        `model`, `adapters` and `optimizer` in MiB.

    Example:
        >>> {name: round(value) for name, value in breakdown("7B", PUBLISHED_AS).items()}
        {'model': 4999, 'adapters': 305, 'optimizer': 1220}
    """
    lora = LoRA(rank=reading.rank, alpha=16)
    found = count(LLAMA_1[size], lora, QuantConfig(double_quant=reading.double_quant))
    return {
        "model": (found.base_bytes + reading.beside_bytes) / MIB,
        "adapters": found.adapter_parameters * reading.adapter_bytes / MIB,
        "optimizer": found.adapter_parameters * reading.optimizer_bytes / MIB,
    }


def render_sizes() -> str:
    """Both tables as Markdown.

    Returns:
        Text that ends in a newline.
    """
    lines = ["# Sizes from configurations alone", "", "## Checkpoints, 16 bits per value", ""]
    lines += ["| model | adapter | model GB | adapter MB | ratio |", "|---|---|---:|---:|---:|"]
    for case in checkpoint_sizes():
        lines.append(
            f"| {case.model} | {case.adapter} | {case.model_bytes / 1e9:,.1f} | "
            f"{case.adapter_bytes / 1e6:,.1f} | {case.ratio:,.0f} |"
        )
    lines += ["", "## QLoRA's published breakdown (MB; batch 1, 512 tokens, r 64)", ""]
    lines += ["| LLaMA | part | published | from shapes | off | as we hold it |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for size, parts in PUBLISHED.items():
        made, ours = breakdown(size, PUBLISHED_AS), breakdown(size, OURS)
        for part, value in parts.items():
            lines.append(
                f"| {size} | {part} | {value:,} | {made[part]:,.0f} | "
                f"{made[part] / value - 1:+.1%} | {ours[part]:,.0f} |"
            )
    return "\n".join([*lines, "", EXPLAINED])
