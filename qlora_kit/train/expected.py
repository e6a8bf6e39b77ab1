"""What a training is held to while it runs: its share of the GPU's rate, and planned memory.

Model FLOPs are what the gradients need, once, whatever is computed again: 4 per weight of a
frozen linear and token (the head too), 6 per trained one, and causal attention's products; the
same as in `bench/flops.py`, read off a model instead of its shape. The share is of what
products in 16 bits sustain on the card (`plan/gpus.py`).
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qlora_kit.adapters.lora.layer import FusibleLinear, Term
from qlora_kit.core.units import GIB
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.plan.gpus import this_gpu
from qlora_kit.train.data.tokenized import TokenizedSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Of a training on a GPU."""

    flops_per_token: float
    """As `model_flops` counts them."""
    gpu_flops: float
    """FLOP/s that large products sustain."""
    peak_bytes: int | None = None
    """Predicted peak of allocated memory; None without a plan."""

    def logs(self, tokens_per_s: float) -> dict[str, float]:
        """What is logged beside speed and memory.

        Args:
            tokens_per_s: of the training.

        Returns:
            `mfu`, and `memory_predicted_gib` if there is a plan.

        Example:
            >>> Expected(flops_per_token=32e9, gpu_flops=640e12).logs(10_000)
            {'mfu': 0.5}
        """
        found = {"mfu": round(tokens_per_s * self.flops_per_token / self.gpu_flops, 4)}
        if self.peak_bytes is not None:
            found["memory_predicted_gib"] = round(self.peak_bytes / GIB, 3)
        return found


def model_flops(model: PreTrainedModel, tokens: float) -> float:
    """FLOPs per token of forward and backward.

    Args:
        model: a causal language model, adapter attached.
        tokens: of a row, on average.

    Returns:
        FLOPs.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
        >>> model_flops(model, 127) == 6 * (7 * 64 * 64 + 32 * 64) + 3 * 2 * 64 * 128
        True
    """
    total = 0.0
    for module in model.modules():
        if isinstance(module, FusibleLinear):
            total += sum(_low_rank_flops(term) for term in module.terms)
        elif isinstance(module, NF4Linear):
            total += 4 * module.out_features * module.in_features
        elif isinstance(module, nn.Linear):
            per_weight = 6 if module.weight.requires_grad else 4
            total += per_weight * module.out_features * module.in_features
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    return total + 3.0 * config.num_hidden_layers * 2 * width * (tokens + 1)


def _low_rank_flops(term: Term) -> float:
    """Of the products of one pair: 6 per value that is trained, 4 per frozen one."""
    a = term.a if term.rows_of_a is None else term.a[term.rows_of_a]
    b = term.b if term.rows_of_b is None else term.b[term.rows_of_b]
    return sum((6.0 if matrix.requires_grad else 4.0) * matrix.numel() for matrix in (a, b))


def expected_of(
    model: PreTrainedModel, train: TokenizedSet, peak_bytes: int | None
) -> Expected | None:
    """What a training's logs are held to.

    Args:
        model: adapter attached.
        train: its rows.
        peak_bytes: predicted, or None without a plan.

    Returns:
        FLOPs and predicted memory; None without a GPU or for a classifier.
    """
    gpu = this_gpu() if model.device.type == "cuda" else None
    if gpu is None or train.task != "causal_lm":
        return None
    mean = train.report.tokens / max(1, train.report.examples)
    flops = model_flops(model, mean)
    return Expected(flops_per_token=flops, gpu_flops=gpu.matrix_flops, peak_bytes=peak_bytes)
