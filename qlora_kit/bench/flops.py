"""Model FLOPs of a training step, and the share of the GPU's peak they amount to (MFU).

Counted is what the gradients need, once: never what is computed again in the backward,
so that MFU compares recomputing and saving by the same yardstick. A frozen base has no
weight gradient, so a linear of P parameters costs 2P in the forward and 2P in the
backward per token, and Llama-3.1-8B needs 4 × 7.5 G per token before attention. Counted:

    linears of the layers and the head      4 P; trained as well (full fine-tuning): 6 P
    attention, causal: scores and values    2 · 2 · heads · head_dim · (T + 1) / 2,
                                            and twice that in the backward
    LoRA, per linear                        6 r (in + out); LoRA-FA has no dA: 2 r · in less

Embeddings, norms and other elementwise work count as nothing. The peak is the rate of
bf16 products that this very card sustained (`timing.peaks`), not a data sheet's.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """FLOPs per token of forward and backward, by part."""

    linears: float
    """The frozen linears of the layers."""
    head: float
    """The output projection."""
    attention: float
    """Scores and weighted values, causal."""
    adapter: float
    """The low-rank products."""

    @property
    def total(self) -> float:
        """All parts."""
        return self.linears + self.head + self.attention + self.adapter


def linear_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """(out, in) of the seven linears of one layer of a Llama-like model.

    Args:
        config: of a dense model.

    Returns:
        q, k, v, o, gate, up, down.

    Example:
        >>> from qlora_kit.bench.shapes import SHAPES
        >>> linear_shapes(SHAPES["Llama-3.1-8B"])[1]
        (1024, 4096)
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return [*attention, (ffn, hidden), (ffn, hidden), (hidden, ffn)]


def step_flops(config: PreTrainedConfig, seq: int, rank: int, method: str) -> StepFlops:
    """FLOPs per token of one training step.

    Args:
        config: of a dense Llama-like model.
        seq: tokens per row.
        rank: of the adapter on every linear; 0 for none.
        method: `lora`, `lora_fa` whose A is frozen, or `full` without an adapter.

    Returns:
        The parts.

    Example:
        >>> from qlora_kit.bench.shapes import SHAPES
        >>> flops = step_flops(SHAPES["Llama-3.1-8B"], 2048, 16, "lora")
        >>> round((flops.linears + flops.head) / 4e9, 2)
        7.5
    """
    layers, per_weight = config.num_hidden_layers, 6.0 if method == "full" else 4.0
    rank = 0 if method == "full" else rank
    shapes = linear_shapes(config)
    width = shapes[0][0]
    inputs = 0 if method == "lora_fa" else 2 * rank * sum(k for _, k in shapes)
    adapter = 4 * rank * sum(n + k for n, k in shapes) + 2 * rank * sum(n for n, _ in shapes)
    return StepFlops(
        linears=per_weight * layers * sum(n * k for n, k in shapes),
        head=per_weight * config.vocab_size * config.hidden_size,
        attention=3.0 * layers * 2 * width * (seq + 1),
        adapter=float(layers * (adapter + inputs)),
    )


def mfu(tokens_per_s: float, flops_per_token: float, peak_tflops: float) -> float:
    """Share of the peak that model FLOPs reach.

    Args:
        tokens_per_s: of training.
        flops_per_token: `StepFlops.total`.
        peak_tflops: of bf16 products, sustained.

    Returns:
        Between 0 and 1, unless the peak is wrong.

    Example:
        >>> mfu(10_000, 32e9, 640)
        0.5
    """
    return tokens_per_s * flops_per_token / (peak_tflops * 1e12)
