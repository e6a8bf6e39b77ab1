"""Let a model's decoder layers run as one step of autograd each, without touching its code.

A layer's class is exchanged for one that derives from `FusedLayer` and the layer's own
class, as torch's `fully_shard` does: modules, parameters, names and `isinstance` stay as
they are, and `remove` exchanges it back. The new `forward` takes over where a training step
or a forward pass without a cache is asked for; for everything else (generation, masks it
does not know, outputs of attention weights) the layer's own code runs.

Padding on the right needs no mask: a causal model's real tokens never see it. So a call
counts as maskless when there is no mask, when the mask is the marker of
`ops/attention/transformers_door.py`, or when the caller says where documents start
(`cu_seq_lens_q` and `max_length_q`, which transformers passes through its models). Without
the marker transformers makes masks for layers with windows and for attention that is eager,
and those layers run their own code.
"""

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.adapters.prompt.prefix_tuning import PromptParameters
from qlora_kit.block.description import Description, why_not
from qlora_kit.block.final_norm import fuse_norm, restore_norm
from qlora_kit.block.layer import Call, forward
from qlora_kit.block.offload import host_store
from qlora_kit.block.operands import Operands
from qlora_kit.block.policy import parse_policy
from qlora_kit.block.runner import Runner, Step
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.log import log_once
from qlora_kit.ops.attention.pair import Documents
from qlora_kit.ops.attention.transformers_door import is_marker
from qlora_kit.ops.autocast import autocast_dtype


class FusedLayer:
    """Mixed into the class of a decoder layer; see the module's text."""

    _runner: Runner

    def forward(
        self,
        hidden_states: Tensor,
        *positional: Any,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **others: Any,
    ) -> Tensor:
        """Run the layer, in one step where that is what the call asks for.

        Args:
            hidden_states: (B, T, H).
            *positional: what some families pass by place; they run their own code.
            attention_mask: None, the marker, or a mask that only the layer's own code knows.
            position_embeddings: cos and sin, (1 or B, T, R).
            past_key_values: a cache, or None.
            cu_seq_lens_q: (n + 1,) where documents start among all tokens, or None.
            max_length_q: tokens of the longest document.
            **others: of the layer's own forward.

        Returns:
            (B, T, H).
        """
        documents = None
        if cu_seq_lens_q is not None and max_length_q is not None:
            documents = Documents(cu_seq_lens_q, int(max_length_q))
        known = attention_mask is None or documents is not None or is_marker(attention_mask)
        plain = past_key_values is None and not positional and not others.get("output_attentions")
        runner = self._runner
        if not (known and plain and position_embeddings) or not runner.fused.may_run(self):
            if torch.is_grad_enabled():
                log_once(
                    "a fused layer runs its own code: the call has a mask or a cache, or "
                    "autocast or dropout ask for it"
                )
            return super().forward(  # type: ignore[misc]
                hidden_states,
                *positional,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                cu_seq_lens_q=cu_seq_lens_q,
                max_length_q=max_length_q,
                **others,
            )
        assert position_embeddings is not None
        batch, length = hidden_states.shape[:2]
        cos, sin = (part.flatten(0, 1) for part in position_embeddings)
        return runner.fused.run(runner, hidden_states, Call(batch, length, cos, sin, documents))


class FusedBlocks:
    """A model's layers, fused; `fuse_blocks` makes these.

    Attributes:
        policies: one word per layer.
        tile: tokens at a time, 0 for `auto`, None for all; counts from the next forward pass on.
        spare: columns of memory that every layer leaves beside the gradient of its input, for
            the ranks of those before.
        host: where tensors wait under the policies that offload.
        handed: the gradient that the last layer's backward gave to the one before, which
            may write beside it and, with tiles, over it.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        policies: tuple[str, ...],
        deterministic: bool,
        tile: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Exchange the classes.

        Args:
            layers: the model's, in order.
            policies: one word each.
            deterministic: gradients must have the same bits twice.
            tile: tokens at a time; see `tiles.tiles_of`.
            model: whose last norm is exchanged as well; None for the layers alone.
        """
        self.layers = layers
        self.policies = policies
        self.tile = tile
        self.handed: Tensor | None = None
        self.host = host_store(next(layers[0].parameters()).device)
        self.deterministic = deterministic
        self._classes: dict[type, type] = {}
        self._decoded: tuple[int, torch.dtype] | None = None
        self._latest = len(layers)
        for index, (layer, policy) in enumerate(zip(layers, policies, strict=True)):
            runner = Runner(self, layer, index, policy)
            layer.__class__ = self._fused_class(type(layer))
            layer._runner = runner  # type: ignore[assignment]
        self._collect()
        self._made: weakref.ref[Tensor] | None = None
        self._norm = None if model is None else fuse_norm(model, layers, self)

    def remove(self) -> None:
        """Give the layers their own classes back."""
        if self._norm is not None:
            restore_norm(self._norm)
        for layer in self.layers:
            if isinstance(layer, FusedLayer):
                layer.__class__ = type(layer).__bases__[1]
                del layer._runner

    def set_policy(self, activations: str) -> None:
        """Change what is kept, from the next forward pass on.

        Args:
            activations: see `policy.parse_policy`.

        Raises:
            ConfigError: the policy is unknown or for another number of layers.
        """
        self.policies = parse_policy(activations, len(self.layers))
        for layer, policy in zip(self.layers, self.policies, strict=True):
            _runner(layer).policy = policy

    def keep_decoded(self, layers: int, dtype: torch.dtype) -> None:
        """Decode the weights of some layers once and for all: memory for speed.

        An 8B model's take 13 GiB in 16 bits, and the decoding
        they save is 13 ms of a step of 490 (counted from one profile, without a record).

        Args:
            layers: how many, from the first on; the others decode in every step.
            dtype: the compute dtype.
        """
        self._decoded = (layers, dtype)
        for index, description in enumerate(self._descriptions()):
            like = torch.empty(0, dtype=dtype, device=description.before_attention.weight.device)
            for group in description.groups:
                group.forget()
                if index < layers:
                    group.keep(like)
        self._operands.forget()

    def kept_decoded(self) -> list[Tensor]:
        """What `keep_decoded` holds, a matrix per group of projections."""
        groups = [group for description in self._descriptions() for group in description.groups]
        return [group.held for group in groups if group.kept and group.held is not None]

    def may_run(self, layer: Any) -> bool:
        """Whether a layer's state now allows one step: no autocast, no dropout, no more trained.

        Args:
            layer: one of the model's.

        Returns:
            False sends the call to the layer's own code; the reason is logged once.
        """
        if autocast_dtype(layer._runner.description.before_attention.weight.device) is not None:
            return False
        runner = _runner(layer)
        if not runner.is_current(layer):
            if why_not(layer) is not None:
                return False
            self._describe_again()
        return runner.may_run(layer)

    def handed_out(self, dy: Tensor) -> bool:
        """Whether a gradient is the very tensor that the layer behind has made, and no sum."""
        handed, self.handed = self.handed, None
        return handed is dy

    def run(self, runner: Runner, x: Tensor, call: Call) -> Tensor:
        """Run one layer.

        Args:
            runner: of the layer.
            x: (B, T, H).
            call: of the forward pass.

        Returns:
            (B, T, H).
        """
        if self.tile:
            if self._operands.are_there:
                self._operands.release()
        elif runner.index <= self._latest:  # a new pass; first layers may run their own code
            self._operands.refresh(x.dtype)
        self._latest = runner.index if not self.tile else len(self.layers)
        description = runner.description
        y: Tensor
        if torch.is_grad_enabled():
            parameters = [p for group in description.groups for p in group.parameters]
            y = Step.apply(x, runner, call, *parameters)
        else:
            flat = x.reshape(-1, x.shape[-1])
            with self.rounded(runner.operands, self.tile, x.dtype):
                y = forward(description, flat, call, "nothing", self.tile)[0].view(x.shape)
        if runner.index == len(self.layers) - 1:
            self._made = weakref.ref(y)
        return y

    def rounded(
        self, own: Operands, tile: int | None, dtype: torch.dtype
    ) -> AbstractContextManager[None]:
        """A and B of a layer in the compute dtype, for what runs inside.

        Args:
            own: the layer's.
            tile: of the pass: a number of tokens lends them to one layer at a time.
            dtype: of the products.

        Returns:
            A context.
        """
        if tile:
            return own.lent(dtype)
        if not self._operands.are_there:  # passes of both kinds, one inside the other
            self._operands.refresh(dtype)
        return nullcontext()

    def made(self, hidden: Tensor) -> bool:
        """Whether a tensor is what the last layer has given, as one step, and nobody changed."""
        return self._made is not None and self._made() is hidden

    def _describe_again(self) -> None:
        """An adapter came or went, or was switched."""
        for layer in self.layers:
            if why_not(layer) is None:
                _runner(layer).describe(layer)
        self._collect()
        self._latest = len(self.layers)
        if self._decoded is not None:
            self.keep_decoded(*self._decoded)

    def _collect(self) -> None:
        """What follows from all layers' descriptions."""
        descriptions = self._descriptions()
        self._operands = Operands([group for d in descriptions for group in d.groups])
        self.spare = max(max(d.o.r, d.down.r) for d in descriptions)

    def _descriptions(self) -> list[Description]:
        return [_runner(layer).description for layer in self.layers]

    def _fused_class(self, kind: type) -> type:
        if kind not in self._classes:
            self._classes[kind] = type(f"Fused{kind.__name__}", (FusedLayer, kind), {})
        return self._classes[kind]


def _runner(layer: nn.Module) -> Runner:
    runner = layer._runner
    assert isinstance(runner, Runner)
    return runner


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model, in order.

    Args:
        model: a transformers model.

    Returns:
        The entries of the largest list of modules; empty if there is none.

    Example:
        >>> decoder_layers(nn.Linear(1, 1))
        []
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def fuse_blocks(
    model: nn.Module,
    activations: str = "recompute_elementwise",
    *,
    deterministic: bool = False,
    tile: int | None = None,
) -> FusedBlocks:
    """Let a model's decoder layers run as one step of autograd each.

    Args:
        model: a causal model of the Llama-like family, adapters attached. Modified: the
            classes of its layers.
        activations: what layers keep for the backward pass; see `policy.parse_policy`.
        deterministic: gradients must have the same bits twice.
        tile: tokens that norms, projections and feed-forward treat at a time; see `tiles.py`.
            With more tiles than one, layers write gradients of hidden states over each other:
            hooks must copy those that they keep, and `torch.autograd.grad` has none to give.

    Returns:
        A handle to change the policy or to undo it.

    Raises:
        ConfigError: the model is of another family or trains what it may not, or the policy
            does not fit it.
    """
    layers = decoder_layers(model)
    reason = why_not_fused(model)
    if reason is not None:
        raise ConfigError(
            f"this model's layers cannot run as one step: {reason}. Use train.step=compiled or "
            "eager."
        )
    return FusedBlocks(layers, parse_policy(activations, len(layers)), deterministic, tile, model)


def why_not_fused(model: nn.Module) -> str | None:
    """The reason why a model cannot be given to `fuse_blocks`, if there is one.

    Args:
        model: any.

    Returns:
        A phrase for a message, or None.

    Example:
        >>> why_not_fused(nn.Linear(1, 1))
        'it has no list of layers'
    """
    if any(isinstance(module, PromptParameters) for module in model.modules()):
        return "it has a prefix or a prompt beside its tokens"
    layers = decoder_layers(model)
    if not layers:
        return "it has no list of layers"
    if any(isinstance(layer, FusedLayer) for layer in layers):
        return "they already do"
    return next((reason for layer in layers if (reason := why_not(layer))), None)
