"""What an adapter costs at inference, as in table 1 of LoRA's paper.

    base       the model alone
    lora       the low-rank product beside every linear, not merged
    merged     the product added to the weights: the same model as `base`
    pfeiffer   a bottleneck per layer, in sequence with it
    houlsby    two

Measured are one forward pass over (batch, sequence) and a generation of some tokens after a
prompt of that shape, by the model's own code as it is called, launches included: at batch 1 an
adapter in sequence costs launches, not arithmetic, which a CUDA graph would hide. Variants
share the model's weights (`merged` has its own) and are timed in turn (`timing.py`).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.record import Row
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.timing import Captured, spread

KINDS = ("pfeiffer", "houlsby")
"""Bottlenecks: one per layer, and two."""

VARIANTS = ("base", "lora", "merged", *KINDS)
"""In the order of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """What is measured."""

    model: str = "GPT-2-medium"
    """As `shapes.config_of` takes it."""
    shapes: tuple[tuple[int, int], ...] = ((32, 512), (16, 256), (1, 128))
    """(batch, sequence); the paper's."""
    new_tokens: int = 16
    """Of a generation; 0 for none."""
    rank: int = 16
    """Of LoRA on all linears."""
    reduction: int = 16
    """Width of the model over that of a bottleneck."""
    seconds: float = 4.0
    """About how long to time a shape's forward passes, and its generations."""
    device: str = "cuda"
    dtype: str = "bfloat16"


def variant(model: PreTrainedModel, name: str, options: LatencyOptions) -> tuple[nn.Module, int]:
    """A model with one kind of adapter.

    Args:
        model: the base; not modified, its weights are shared.
        name: one of `VARIANTS`.
        options: sizes of adapters.

    Returns:
        The adapted model, and how many values the adapter has.

    Example:
        >>> options = LatencyOptions(model="tiny", rank=2, device="cpu", dtype="float32")
        >>> base = random_model(config_of("tiny"), None, device="cpu", dtype=torch.float32)
        >>> variant(base, "base", options)[1], variant(base, "lora", options)[1]
        (0, 4096)
    """
    shared = [*model.parameters(), *model.buffers()]
    made: PreTrainedModel = copy.deepcopy(model, {id(t): t for t in shared})
    if name == "base":
        return made, 0
    if name in KINDS:
        bottleneck = Bottleneck(
            kind=name,  # type: ignore[arg-type]
            reduction=options.reduction,
            norms="freeze",
            activation="relu",
            dtype=options.dtype,  # type: ignore[arg-type]
        )
        count = attach(made, bottleneck).num_trainable
        return made.requires_grad_(False), count
    adapter = attach(made, LoRA(rank=options.rank, alpha=options.rank, dtype=options.dtype))
    with torch.no_grad():
        for piece in adapter.pieces:
            assert isinstance(piece, LoRALinear)
            piece.lora_B.normal_(0, 0.02)
    count = adapter.num_trainable
    if name == "merged":
        deltas = {piece.place: piece.merge_delta() for piece in adapter.pieces}
        adapter.detach_from_model()
        for place, delta in deltas.items():
            assert delta is not None
            _add(made.get_submodule(place), delta)
    return made.eval(), count


def _add(linear: nn.Module, delta: Tensor) -> None:
    weight = linear.get_parameter("weight")
    change = delta.T if isinstance(linear, Conv1D) else delta
    merged = (weight.float() + change).to(weight.dtype)
    linear.weight = nn.Parameter(merged, requires_grad=False)


def measure_latency(options: LatencyOptions) -> list[Row]:
    """Time every variant at every shape.

    Args:
        options: what is measured.

    Returns:
        Rows: model, batch, seq, measure (`forward` or `generate`), variant, parameters,
        ms_median, ms_p10, ms_p90, overhead (against `base`, in the same run).
    """
    config, dtype = config_of(options.model), getattr(torch, options.dtype)
    base = random_model(config, None, device=options.device, dtype=dtype)
    models = {name: variant(base, name, options) for name in VARIANTS}
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(0)
    for batch, seq in options.shapes:
        ids = torch.randint(3, config.vocab_size, (batch, seq), generator=generator)
        ids = ids.to(options.device)
        for measure in ("forward", "generate") if options.new_tokens else ("forward",):
            times = _time(models, ids, measure, options)
            for name, values in times.items():
                row: Row = {"model": options.model, "batch": batch, "seq": seq, "measure": measure}
                row |= {"variant": name, "parameters": models[name][1], **spread(values)}
                row["overhead"] = row["ms_median"] / spread(times["base"])["ms_median"] - 1.0
                rows.append(row)
            print(_lines(rows[-len(times) :]), flush=True)
    return rows


def _time(
    models: dict[str, tuple[nn.Module, int]], ids: Tensor, measure: str, options: LatencyOptions
) -> dict[str, list[float]]:
    """Sorted milliseconds of one call of each variant."""
    captured = Captured(graphs=False)
    made = GenerationConfig(
        max_new_tokens=options.new_tokens,
        min_new_tokens=options.new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    mask = torch.ones_like(ids)
    for name, (model, _) in models.items():

        def call(_index: int, model: nn.Module = model) -> object:
            with torch.no_grad():
                if measure == "forward":
                    return model(input_ids=ids, use_cache=False).logits.shape
                generate = getattr(model, "generate")  # noqa: B009  a mixin's, unknown to types
                return generate(ids, attention_mask=mask, generation_config=made).shape

        captured.add(name, call, 1, 1)
    return captured.time(1, options.seconds)


def _lines(rows: Sequence[Row]) -> str:
    first = rows[0]
    head = f"{first['model']} {first['batch']} x {first['seq']}, {first['measure']}"
    parts = [f"{r['variant']} {r['ms_median']:.2f} ms ({r['overhead']:+.1%})" for r in rows]
    return f"{head}: " + ", ".join(parts)


def render_latency(rows: Sequence[Row]) -> str:
    """The table of LoRA's paper, with these figures.

    Args:
        rows: of `measure_latency`.

    Returns:
        Markdown; ends in a newline.

    Example:
        >>> row = {"model": "m", "batch": 1, "seq": 8, "measure": "forward", "variant": "base",
        ...     "parameters": 0, "ms_median": 2.0, "overhead": 0.0}
        >>> render_latency([row]).splitlines()[-1]
        '| m, 1 × 8, forward | 2.00 |'
    """
    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    sizes = {row["variant"]: row["parameters"] for row in rows}
    titles = [f"{name} ({sizes[name] / 1e6:.1f}M)" if sizes[name] else name for name in names]
    lines = ["| ms | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(names)]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        where = f"{row['model']}, {row['batch']} × {row['seq']}, {row['measure']}"
        more = "" if row["variant"] == "base" else f" ({row['overhead']:+.1%})"
        found.setdefault(where, {})[row["variant"]] = f"{row['ms_median']:.2f}{more}"
    lines += [
        f"| {where} | " + " | ".join(cells.get(name, "–") for name in names) + " |"
        for where, cells in found.items()
    ]
    return "\n".join(lines) + "\n"
