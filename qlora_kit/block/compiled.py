"""Let torch.compile run a model's decoder layers in training, one graph for all that are alike.

The general path, for every causal model: the layer's own code, traced once and compiled with
the forward and backward of our ops inside it. `install.py` is the faster one for the families
it knows. As there, a layer's class is exchanged for one that derives from `CompiledLayer` and
the layer's own class, and `remove` exchanges it back; no code and no name changes.

Layers are compiled with `fullgraph=True`: what cannot be one graph is an error that says why.
One graph serves all layers of the same structure, the first included: its input, which needs
no gradient, is given one, for less than one percent of a step. Another graph is made where
layers differ (windows, ranks), and once more when sizes change, with the sizes as variables.

What a layer keeps for its backward pass, by the words of `policy.py`:

    save                    what torch's partitioner thinks best: some norms and activations
    recompute_elementwise   results of matrix products and attention
    recompute_all           the layer's input

Gradients are recorded through the graph only while they are asked for and no cache is given:
generation and evaluation run the layer's own code, which compiles nothing.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import Cache

from qlora_kit.block.install import FusedLayer, decoder_layers
from qlora_kit.block.policy import parse_policy
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.log import log_once
from qlora_kit.nn.experts import NF4Experts

POLICIES = ("save", "recompute_elementwise", "recompute_all")
"""Words of `policy.POLICIES` that compiled layers know."""

GRAPHS = 64
"""Graphs that one model's layers may need: kinds of layers times sizes seen. torch allows 8."""

_KEPT = (
    "qlora_kit::nf4_linear",
    "qlora_kit::attention",
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)
"""Operators whose results `recompute_elementwise` keeps. Not `bmm`: attention that is eager
would keep a score for every pair of tokens."""

Step = Callable[..., Any]


class CompiledLayer:
    """Mixed into the class of a decoder layer; see the module's text."""

    _compiled_step: Step

    def forward(self, hidden_states: Tensor, *positional: Any, **others: Any) -> Any:
        """Run the layer, through its graph where gradients are asked for.

        Args:
            hidden_states: (B, T, H).
            *positional: of the layer's own forward.
            **others: of the layer's own forward.

        Returns:
            What the layer's own forward returns.

        Raises:
            ConfigError: the layer cannot be compiled as one graph, or not on this machine.
        """
        cached = any(isinstance(value, Cache) for value in (*positional, *others.values()))
        if cached or not torch.is_grad_enabled():
            if torch.is_grad_enabled():
                log_once("a compiled layer runs its own code, for the call has a cache")
            own: Step = super().forward  # type: ignore[misc]
            return own(hidden_states, *positional, **others)
        if not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()
        try:
            return self._compiled_step(self, hidden_states, *positional, **others)
        except TorchDynamoException as error:
            kind = type(self).__bases__[1].__name__
            raise ConfigError(
                f"torch.compile cannot run {kind} as one graph: {_reason(error)} Use "
                "train.step=eager."
            ) from error


class CompiledLayers:
    """A model's layers, compiled; `compile_layers` makes these.

    Attributes:
        layers: the model's, in order.
        policies: one word per layer.
    """

    def __init__(
        self, layers: list[nn.Module], policies: tuple[str, ...], dynamic: bool | None, backend: str
    ) -> None:
        """Exchange the classes.

        Args:
            layers: the model's, in order.
            policies: one word of `POLICIES` each.
            dynamic: as in `torch.compile`.
            backend: as in `torch.compile`.
        """
        self.layers = layers
        self._dynamic, self._backend = dynamic, backend
        self._classes: dict[type, type] = {}
        self._steps: dict[tuple[type, str], Step] = {}
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
        for layer in layers:
            kind = type(layer)
            if kind not in self._classes:
                self._classes[kind] = type(f"Compiled{kind.__name__}", (CompiledLayer, kind), {})
            layer.__class__ = self._classes[kind]
        self._choose(policies)

    def set_policy(self, activations: str) -> None:
        """Change what is kept, from the next forward pass on.

        Args:
            activations: words of `POLICIES`; see `policy.parse_policy`.

        Raises:
            ConfigError: the policy is unknown or for another number of layers.
        """
        self._choose(_parse(activations, len(self.layers)))

    def remove(self) -> None:
        """Give the layers their own classes back."""
        for layer in self.layers:
            if isinstance(layer, CompiledLayer):
                layer.__class__ = type(layer).__bases__[1]
                del layer._compiled_step

    def _choose(self, policies: tuple[str, ...]) -> None:
        self.policies = policies
        for layer, policy in zip(self.layers, policies, strict=True):
            kind: Any = type(layer).__bases__[1]
            if (kind, policy) not in self._steps:
                self._steps[kind, policy] = torch.compile(
                    _with_policy(kind.forward, policy),
                    fullgraph=True,
                    dynamic=self._dynamic,
                    backend=self._backend,
                )
            layer._compiled_step = self._steps[kind, policy]  # type: ignore[assignment]


def compile_layers(
    model: nn.Module,
    activations: str = "save",
    *,
    dynamic: bool | None = None,
    backend: str = "inductor",
) -> CompiledLayers:
    """Compile a model's decoder layers for training; the work is done at the first step.

    Args:
        model: any with a list of layers, adapters attached. Modified: the classes of its
            layers.
        activations: what layers keep for the backward pass; see the module's text, and
            `policy.parse_policy` for mixtures.
        dynamic: True compiles once for all sizes of batch and row, False anew for each; None
            begins with the sizes at hand and turns those that change into variables.
        backend: of `torch.compile`.

    Returns:
        A handle to change the policy or to undo it.

    Raises:
        ConfigError: the model cannot be compiled, or the policy does not fit it.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=8))
        >>> compiled = compile_layers(model, "save:1,recompute_all", backend="eager")
        >>> type(model.transformer.h[0]).__name__, compiled.policies
        ('CompiledGPT2Block', ('save', 'recompute_all'))
        >>> compiled.remove()
    """
    reason = why_not_compiled(model, backend)
    if reason is not None:
        raise ConfigError(
            f"this model's layers cannot be compiled: {reason}. Use train.step=eager."
        )
    layers = decoder_layers(model)
    return CompiledLayers(layers, _parse(activations, len(layers)), dynamic, backend)


def why_not_compiled(model: nn.Module, backend: str = "inductor") -> str | None:
    """The reason why a model cannot be given to `compile_layers`, as far as one can know before.

    Args:
        model: any.
        backend: of `torch.compile`.

    Returns:
        A phrase for a message, or None.

    Example:
        >>> why_not_compiled(nn.Linear(1, 1))
        'it has no list of layers'
    """
    layers = decoder_layers(model)
    if not layers:
        return "it has no list of layers"
    if any(isinstance(layer, FusedLayer) for layer in layers):
        return "they are fused"
    if any(isinstance(layer, CompiledLayer) for layer in layers):
        return "they already are"
    if any(isinstance(module, NF4Experts) for layer in layers for module in layer.modules()):
        return "which of their experts a token needs is read by the host, as these are in 4 bits"
    return _missing_compiler(next(layers[0].parameters()).device) if backend == "inductor" else None


def _parse(activations: str, layers: int) -> tuple[str, ...]:
    policies = parse_policy(activations, layers)
    unknown = sorted(set(policies) - set(POLICIES))
    if unknown:
        raise ConfigError(
            f"compiled layers have no activation policy {unknown[0]!r}; they know "
            f"{', '.join(POLICIES)}."
        )
    return policies


def _with_policy(forward: Step, policy: str) -> Step:
    """A layer's forward under a policy, for torch.compile to trace."""
    if policy == "save":
        return forward
    if policy == "recompute_all":
        return partial(checkpoint, forward, use_reentrant=False)
    return partial(checkpoint, forward, use_reentrant=False, context_fn=_keeping_products)


def _keeping_products() -> Any:
    return create_selective_checkpoint_contexts(_keep_or_recompute)


def _keep_or_recompute(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Answer for one operator of a layer."""
    if op.name() in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs beside torch and does not find."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs the package triton on a GPU"
    variable, names = ("CC", ("gcc", "clang", "cc", "cl"))
    if device.type == "cpu":
        variable, names = ("CXX", ("g++", "clang++", "c++", "cl"))
    asked = os.environ.get(variable)
    if any(shutil.which(name) for name in ((asked,) if asked else names)):
        return None
    what = "C++" if variable == "CXX" else "C"
    return f"torch.compile needs a {what} compiler ({names[0]}, or what {variable} names)"


def _reason(error: TorchDynamoException) -> str:
    """The first line of what went wrong; the rest is in the error that ours was raised from."""
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{lines[0].rstrip('.:')}." if lines else f"{type(inner).__name__}."
