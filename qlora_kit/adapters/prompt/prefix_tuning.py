"""Prefix-tuning: trained keys and values, in every layer, at l positions that have no token.

    attention of layer i:  K' = [P_K(i); K],  V' = [P_V(i); V]      P (l, 2·L·kv)

with kv = kv_heads·head_dim columns for K and for V (d without grouped-query attention). The tokens'
positions move up by l. The values are not trained directly by default, which the paper found
unstable, but made by an MLP of its own small embedding:

    P = Linear(k, 2·L·kv)(tanh(Linear(d, k)(E)))      E (l, d), k = 512 (800 for summaries)

The MLP is dropped from what is saved; a checkpoint to resume from keeps it.

`place=infix` puts them between prompt and answer: the last token of the prompt and everything
behind it see them and have moved positions, what is before does not.

How it acts: a forward pre-hook of the base model works out P and the positions, and the model's
attention runs under a name registered in transformers' own `AttentionInterface`, whose function
puts P in front of K and V and of the mask, which is otherwise the model's own (padding, windows,
packed rows). A cache holds the tokens alone. So gradient checkpointing, generation, and encoders
(which have no cache) work alike; PEFT, which hands P over in a cache, refuses the first. A
forward in which a layer's attention did not ask for its prefix is an error.

At the start the model is not the base: even values of zero take part in the softmax. It cannot
be merged: positions are not weights.

Layout of P and of the saved file: as PEFT's, per position K then V of layer 0, of layer 1, ...

Defaults: l = 10, k = 512. Source: arXiv:2101.00190.
"""

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from qlora_kit.adapters.prompt.answer_start import announced_labels, last_prompt_token
from qlora_kit.adapters.prompt.config import PrefixTuning
from qlora_kit.adapters.prompt.shape import (
    PromptShape,
    as_keywords,
    blocks,
    cached_tokens,
    call_size,
    prompt_shape,
)
from qlora_kit.core.errors import AdapterError
from qlora_kit.ops.attention.transformers_door import attention_function

NAME = "qlora_kit_prefix"
"""What models with a prefix have as `attn_implementation`."""
VALUES = "qlora_kit_prefix.values"
"""Key of P once the MLP is dropped."""
SLOT = "_qlora_kit_prefix"
"""Attribute of an attention module: the prefix, and which layer it is."""


class PromptParameters(nn.Module):
    """What a prefix or a prompt trains; a child of the base model while it is attached."""

    place = "the prompt"


class Prefix(PromptParameters):
    """The parameters of a prefix, and its values in the current forward pass."""

    def __init__(self, config: PrefixTuning, shape: PromptShape, device: torch.device, seed: int):
        super().__init__()
        self.config, self.shape = config, shape
        self.enabled = True
        options: dict[str, Any] = {"device": device, "dtype": getattr(torch, config.dtype)}
        columns = 2 * shape.layers * shape.kv_width
        self.values: nn.Parameter | None = None
        if config.hidden is None:
            self.values = nn.Parameter(torch.empty(config.length, columns, **options))
        else:
            self.embedding = nn.Parameter(torch.empty(config.length, shape.width, **options))
            self.inner = nn.Linear(shape.width, config.hidden, device="meta")
            self.outer = nn.Linear(config.hidden, columns, device="meta")
            self.inner.to_empty(device=device).to(options["dtype"])
            self.outer.to_empty(device=device).to(options["dtype"])
        if device.type != "meta":
            self._start(seed)
        self.now: Tensor | None = None
        self.sees: Tensor | None = None
        self.asked: set[int] = set()
        self.labels: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a forward pass: copies of a model start without."""
        return self.__dict__ | {"now": None, "sees": None, "labels": None, "asked": set()}

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}:prefix".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        for name, parameter in self.named_parameters():
            start = torch.empty(parameter.shape)
            if name in ("values", "embedding"):
                start.normal_(0.0, 0.02 if name == "values" else 1.0, generator=generator)
            else:  # as nn.Linear starts
                fan_in = self.shape.width if name.startswith("inner") else self.outer.in_features
                start.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            parameter.copy_(start)

    def forward(self) -> Tensor:
        """Work out P.

        Returns:
            (l, 2·L·kv) in the master dtype.
        """
        if self.values is not None:
            return self.values
        return self.outer(torch.tanh(self.inner(self.embedding)))

    def of_layer(self, layer: int, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer in the current pass, each (B, heads, l, head_dim)."""
        assert self.now is not None
        self.asked.add(layer)
        shape = self.shape
        pair = self.now.view(-1, shape.layers, 2, shape.kv_heads, shape.head_dim)[:, layer]
        key, value = pair.to(like.dtype).permute(1, 2, 0, 3).unbind()  # (heads, l, head_dim)
        return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


def _mask(*positional: Any, **named: Any) -> Tensor | None:
    """The mask of transformers, always made: one left out would show a prefix the future."""
    return sdpa_mask(*positional, **named | {"allow_is_causal_skip": False})


def attention_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend to the prefix and to the tokens, as transformers' `AttentionInterface` has it.

    Args:
        module: the attention layer, which knows its prefix.
        query: (B, Hq, T, D).
        key: (B, Hk, S, D), S above T with a cache.
        value: (B, Hk, S, D).
        attention_mask: (B, 1, T, S) booleans or summands, or None.
        **others: transformers' contract, handed on.

    Returns:
        (B, T, Hq, D); None for the weights.
    """
    slot = getattr(module, SLOT, None)
    if slot is None or not slot[0].enabled:
        return attention_function(module, query, key, value, attention_mask, **others)
    prefix, layer = slot
    batch, _, length, _ = query.shape
    own_key, own_value = prefix.of_layer(layer, batch, key)
    if attention_mask is None and getattr(module, "is_causal", True) and length > 1:
        ones = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(key.shape[2] - length).expand(batch, 1, -1, -1)
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        seen = prefix.sees if prefix.sees is not None else query.new_ones(1, 1, dtype=torch.bool)
        seen = seen[:, None, :, None].expand(batch, 1, length, own_key.shape[2])
        if attention_mask.dtype != torch.bool:
            low = torch.finfo(attention_mask.dtype).min
            seen = torch.zeros_like(seen, dtype=attention_mask.dtype).masked_fill(~seen, low)
        attention_mask = torch.cat([seen, attention_mask.expand(batch, -1, length, -1)], dim=-1)
    key = torch.cat([own_key, key], dim=2)
    value = torch.cat([own_value, value], dim=2)
    return attention_function(module, query, key, value, attention_mask, **others)


class PrefixPiece:
    """A prefix on a model: hooks of the base model, a name for its attention."""

    def __init__(self, model: nn.Module, config: PrefixTuning, seed: int) -> None:
        """Make the parameters; the model is changed by `install`.

        Args:
            model: a decoder or an encoder of transformers.
            config: length, MLP and place.
            seed: of the start.

        Raises:
            AdapterError: the model is of another kind, or an infix is asked of an encoder.
        """
        shape = prompt_shape(model)
        if config.place == "infix" and not shape.causal:
            raise AdapterError("an infix stands before an answer, and an encoder has none.")
        first = next(model.parameters())
        assert isinstance(model, PreTrainedModel)
        self.place, self._model = shape.place, model
        self._attention: str | None = model.config._attn_implementation
        self.config = config
        self.prefix = Prefix(config, shape, first.device, seed)

    @property
    def enabled(self) -> bool:
        """Whether the model sees the prefix."""
        return self.prefix.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.prefix.enabled = value
        # switched off, the model attends as it did, which is not the same to the last bit
        self._model.set_attn_implementation(NAME if value else self._attention)

    def install(self, model: nn.Module) -> None:
        """Register hooks and the attention's name."""
        assert isinstance(model, PreTrainedModel)
        AttentionInterface.register(NAME, attention_with_prefix)
        AttentionMaskInterface.register(NAME, _mask)
        base = model.get_submodule(self.place)
        base.add_module("qlora_kit_prefix", self.prefix)
        for index, layer in enumerate(blocks(model, self.prefix.shape)):
            for module in layer.modules():
                if "Attention" in type(module).__name__:
                    setattr(module, SLOT, (self.prefix, index))
        self._handles = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after),
        ]
        if base is not model:
            self._handles.append(model.register_forward_pre_hook(self._look, with_kwargs=True))
        model.set_attn_implementation(NAME)

    def uninstall(self, model: nn.Module) -> None:
        """Remove all of it."""
        assert isinstance(model, PreTrainedModel)
        model.set_attn_implementation(self._attention)
        for handle in self._handles:
            handle.remove()
        base = model.get_submodule(self.place)
        del base.qlora_kit_prefix
        for module in model.modules():
            if hasattr(module, SLOT):
                delattr(module, SLOT)

    def _look(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self.prefix.labels = kwargs.get("labels")

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Work out P, which queries see it, and the tokens' positions."""
        prefix = self.prefix
        if not prefix.enabled:
            return None
        call = as_keywords(module, args, kwargs)
        past = cached_tokens(call)
        batch, length, device = call_size(call)
        prefix.now, prefix.sees = prefix(), None
        prefix.asked.clear()
        moved: Tensor | int = self.config.length
        if self.config.place == "infix" and past == 0:
            labels = announced_labels()
            labels = prefix.labels if labels is None else labels
            last = last_prompt_token(labels, call.get("attention_mask"), length).to(device)
            prefix.sees = torch.arange(length, device=device) >= last
            moved = moved * prefix.sees
            if call.get("attention_mask") is None:  # or the step in positions means packed rows
                call["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=device)
        call["position_ids"] = _positions(module, call, length, past, device) + moved
        prefix.labels = None
        return (), call

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        prefix = self.prefix
        if prefix.enabled and len(prefix.asked) != prefix.shape.layers:
            raise AdapterError(
                f"{len(prefix.asked)} of {prefix.shape.layers} layers asked for their prefix: the "
                f"model's attention does not run as {NAME!r}. Leave its attn_implementation as "
                "the adapter has set it, and do not fuse or compile its layers."
            )

    def trainable(self) -> dict[str, nn.Parameter]:
        """P itself, or the MLP's parameters."""
        return {f"qlora_kit_prefix.{name}": p for name, p in self.prefix.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """The same."""
        return dict(self.trainable())

    def without_mlp(self) -> tuple[PrefixTuning, dict[str, Tensor]]:
        """What is kept after training: the configuration and P, by its name in the model."""
        with torch.no_grad():
            values = self.prefix()
        return replace(self.config, hidden=None), {f"{self.place}.{VALUES}": values}

    def sizes(self) -> dict[str, int]:
        """The model's sizes by the names in PEFT's file."""
        shape = self.prefix.shape
        sizes = {"token_dim": shape.kv_width, "num_attention_heads": shape.kv_heads}
        return sizes | {"num_layers": shape.layers}

    def merge_delta(self) -> Tensor | None:
        """Refuse.

        Returns:
            Never.

        Raises:
            AdapterError: always.
        """
        raise AdapterError("a prefix is not a change of weights and cannot be merged.")


def _positions(
    module: nn.Module, call: dict[str, Any], length: int, past: int, device: torch.device
) -> Tensor:
    """The positions that the tokens would have without a prefix, (1 or B, T)."""
    given = call.get("position_ids")
    if given is not None:
        positions: Tensor = given
        return positions
    embeddings = getattr(module, "embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    counted = getattr(embeddings, "create_position_ids_from_input_ids", None)
    ids = call.get("input_ids")
    if counted is not None and padding is not None:  # RoBERTa counts from behind its padding
        if ids is not None:
            found: Tensor = counted(ids, padding, past)
            return found
        past += padding + 1
    return torch.arange(past, past + length, device=device)[None]
