"""Models, gradients and truths for tests of `qlora_kit/block`.

The truth is Hugging Face's own code with eager attention. That code computes norms, softmax,
rotary positions and loss in float32 whatever the model's dtype; `Float64` turns those into
float64, so that a float64 model is compared at float64's precision.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import DoRA, LoRA, LoRAFA
from qlora_kit.block.install import FusedBlocks
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.attention.transformers_door import unpadded_inputs
from tests import tiny_models
from tests.adapters.bases import quantize

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
WINDOWED = ("mistral", "gemma2", "gemma3", "phi3")
"""Families whose tiny models see 64 tokens back."""

LENGTH = 70
"""Tokens of a row: more than the window."""

METHODS: dict[str, LoRA] = {
    "lora": LoRA(rank=4, alpha=5.0),
    "lora_fa": LoRAFA(rank=4, alpha=5.0),
    "adalora": AdaLoRA(rank=4, alpha=5.0, budget=RankBudget(target_rank=2)),
    "dora": DoRA(rank=4, alpha=5.0),
    "pissa": LoRA(rank=4, alpha=5.0, init="pissa"),
}
"""Configurations whose scale, 1.25, is no power of two."""

Gradients = dict[str, Tensor]


class Float64(TorchFunctionMode):
    """Computes in float64 what code asks to be computed in float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        changed = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **changed)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def exactly(model: nn.Module) -> AbstractContextManager[object]:
    """`Float64` for a model in float64, else nothing."""
    return Float64() if model.dtype == torch.float64 else nullcontext()


def make(
    family: str = "llama",
    config: LoRA = METHODS["lora"],
    *,
    dtype: torch.dtype = torch.float64,
    nf4: bool = False,
    **changes: Any,
) -> tuple[PreTrainedModel, AttachedAdapter]:
    """A tiny model with a trained-looking adapter, in training mode.

    Args:
        family: of `tiny_models`.
        config: of the adapter; B is made random.
        dtype: of the model, and in float64 of the adapter.
        nf4: quantize the linears.
        **changes: to the model's configuration.

    Returns:
        The model, with eager attention, and its adapter.
    """
    if family == "gemma3":  # a layer of each kind
        changes.setdefault("layer_types", ["sliding_attention", "full_attention"])
    model = tiny_models.build(family, dtype=dtype, **changes)
    model.set_attn_implementation("eager")
    if nf4:
        quantize(model)
    adapter = attach(model, config)
    randomize(adapter)
    return (model.double() if dtype == torch.float64 else model).train(), adapter


def randomize(adapter: AttachedAdapter, seed: int = 1) -> None:
    """Make every B random, small enough that the model stays the model, λ and row lengths too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in adapter.state_dict().items():
            if name.endswith("lora_B"):
                tensor.normal_(0.0, 0.1, generator=generator)
            elif name.endswith("lora_E"):  # beside a Q of 0.02
                tensor.normal_(0.0, 5.0, generator=generator)
            elif name.endswith("lora_magnitude"):
                tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))


def maskless() -> dict[str, Any]:
    """Arguments that say: nothing is hidden but by causality and windows."""
    return {"use_cache": False, **unpadded_inputs()}


def loss_and_gradients(
    model: PreTrainedModel, ids: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Gradients]:
    """Run a training step without an optimizer.

    Args:
        model: its gradients are reset.
        ids: (B, T); two rows of `LENGTH` by default.
        labels: (B, T); the ids by default.
        **inputs: others of the model.

    Returns:
        The loss, and copies of all gradients by parameter.
    """
    ids = tiny_models.tokens(2, LENGTH) if ids is None else ids
    model.zero_grad()
    with exactly(model):
        output = model(input_ids=ids, labels=ids if labels is None else labels, **inputs)
        output.loss.backward()
    return output.loss.detach(), gradients(model)


def gradients(model: nn.Module) -> Gradients:
    """Copies of the gradients there are."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def truth_of(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy whose linears hold the very weights that the model computes with."""
    exact = copy.deepcopy(model)
    for name, module in list(exact.named_modules()):
        if isinstance(module, NF4Linear):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.weight = nn.Parameter(module.dequantize(model.dtype))
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.detach())
            exact.set_submodule(name, dense.requires_grad_(False))
    return exact.double()


def errors(found: Gradients, truth: Gradients) -> list[float]:
    """Relative error in norm, parameter by parameter; they must be the same parameters."""
    assert found.keys() == truth.keys()
    assert truth
    return [
        float((found[name].double() - wanted).norm() / wanted.norm())
        for name, wanted in truth.items()
    ]


def total_error(found: Gradients, truth: Gradients) -> float:
    """Relative error in norm of all gradients together."""
    wrong = sum((found[name].double() - wanted).square().sum() for name, wanted in truth.items())
    return float((wrong / sum(wanted.square().sum() for wanted in truth.values())) ** 0.5)


@contextmanager
def counted(fused: FusedBlocks) -> Iterator[list[int]]:
    """Note which layers run as one step, in order of their runs.

    Yields:
        The layers' numbers.
    """
    ran: list[int] = []
    own = fused.run

    def run(runner: Any, *others: Any) -> Tensor:
        ran.append(runner.index)
        return own(runner, *others)

    fused.run = run  # type: ignore[method-assign]
    try:
        yield ran
    finally:
        del fused.run
