"""Prompt-tuning: l trained positions that have no token, as embeddings or in every layer.

    PreEmbed    [P; x; y] enters the first block, P (l, d); what follows is computed: d·l values
    PreLayer    the states at the l positions are replaced by trained ones at the input of every
                block, P (L, l, d): L·d·l values (the states after the last block affect nothing)

`place=infix`: [x; P; y], between prompt and answer, and the last position of P predicts the first
token of the answer. The embeddings start from those of tokens drawn at random (`vocabulary`).

How it acts: a forward pre-hook of the base model puts the positions among the embeddings, the mask
and the positions, a forward hook takes them out of its output again, so that labels, heads and
losses see the tokens alone; an encoder's pooler is asked again, for the first token that is one.
PreLayer adds a forward pre-hook to every block. A cache keeps the positions like tokens'.

Packed rows are refused: the positions stand in front of a row, where only its first document
would see them. At the start the model is not the base. It cannot be merged.

Defaults: l = 10. Source: arXiv:2104.08691, PreEmbed and PreLayer as in arXiv:2106.09685, 5.1.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.prompt.answer_start import announced_labels, last_prompt_token
from qlora_kit.adapters.prompt.config import PromptTuning
from qlora_kit.adapters.prompt.prefix_tuning import PromptParameters
from qlora_kit.adapters.prompt.shape import (
    PromptShape,
    as_keywords,
    blocks,
    cached_tokens,
    call_size,
    prompt_shape,
)
from qlora_kit.core.errors import AdapterError
from qlora_kit.ops.attention.transformers_door import is_marker

SIGMA = 0.02
"""Of a normal start."""


class Prompt(PromptParameters):
    """The parameters: `embedding` (l, d), and `states` (L - 1, l, d) of the blocks behind."""

    def __init__(
        self,
        config: PromptTuning,
        shape: PromptShape,
        table: Tensor,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": getattr(torch, config.dtype)}
        self.embedding = nn.Parameter(torch.empty(config.length, shape.width, **options))
        self.states: nn.Parameter | None = None
        if config.layers == "all":
            size = (shape.layers - 1, config.length, shape.width)
            self.states = nn.Parameter(torch.empty(size, **options))
        if table.is_meta:
            return
        digest = hashlib.sha256(f"{seed}:prompt".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        with torch.no_grad():
            if config.init == "vocabulary" and table.shape[1] == shape.width:
                drawn = torch.randint(table.shape[0], (config.length,), generator=generator)
                self.embedding.copy_(table[drawn.to(table.device)])
            else:
                start = torch.empty(self.embedding.shape)
                self.embedding.copy_(start.normal_(0.0, SIGMA, generator=generator))
            if self.states is not None:
                start = torch.empty(self.states.shape)
                self.states.copy_(start.normal_(0.0, SIGMA, generator=generator))


class _Places:
    """Where the l positions stand among T tokens in one forward pass."""

    def __init__(self, virtual: int, length: int, last: Tensor | None) -> None:
        """Work out the indices.

        Args:
            virtual: l.
            length: T.
            last: (B, 1) the last token before them; None: they come first.
        """
        device = None if last is None else last.device
        new = torch.arange(virtual + length, device=device)[None]
        tokens = torch.arange(length, device=device)[None]
        ones = torch.arange(virtual, device=device)[None]
        self.order, self.kept, self.virtual = new, tokens + virtual, ones
        self.predicting = None
        if last is not None:
            inside = torch.where(new <= last + virtual, new - last - 1, new)
            self.order = torch.where(new <= last, new + virtual, inside)
            self.virtual = ones + last + 1
            self.moved = virtual * (tokens > last)
            self.kept = tokens + virtual * (tokens >= last)  # the last of them predicts
        else:
            self.moved = torch.full((1, length), virtual)

    def mix(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Put (B, l, ...) among (B, T, ...)."""
        both = torch.cat([ours, theirs], dim=1)
        index = self.order.to(both.device)
        return _gather(both, index)


def _gather(source: Tensor, index: Tensor) -> Tensor:
    index = index.expand(source.shape[0], -1)
    if source.ndim == 3:
        return source.gather(1, index[..., None].expand(-1, -1, source.shape[2]))
    return source.gather(1, index)


def _embeddings(base: nn.Module) -> nn.Module:
    assert isinstance(base, PreTrainedModel)
    found = base.get_input_embeddings()
    assert isinstance(found, nn.Module)
    return found


class PromptPiece:
    """A prompt on a model: hooks of the base model and, for PreLayer, of its blocks."""

    def __init__(self, model: nn.Module, config: PromptTuning, seed: int) -> None:
        """Make the parameters; the model is changed by `install`.

        Args:
            model: a decoder or an encoder of transformers.
            config: length, layers, place and start.
            seed: of the start.

        Raises:
            AdapterError: the model is of another kind, or an infix is asked of an encoder.
        """
        self.shape = shape = prompt_shape(model)
        if config.place == "infix" and not shape.causal:
            raise AdapterError("an infix stands before an answer, and an encoder has none.")
        self.place, self.config, self.enabled = shape.place, config, True
        table = _embeddings(model.get_submodule(shape.place)).weight
        assert isinstance(table, Tensor)
        device = next(model.parameters()).device  # the table may stay in host memory
        self.prompt = Prompt(config, shape, table, device, seed)
        self._labels: Tensor | None = None
        self._places: _Places | None = None

    def install(self, model: nn.Module) -> None:
        """Register the hooks."""
        base = model.get_submodule(self.place)
        base.add_module("qlora_kit_prompt", self.prompt)
        self._handles = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after, with_kwargs=True),
        ]
        if base is not model:
            self._handles.append(model.register_forward_pre_hook(self._look, with_kwargs=True))
        if self.prompt.states is not None:
            for index, block in enumerate(blocks(model, self.shape)[1:]):
                hook = _Replace(self, index)
                self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))

    def uninstall(self, model: nn.Module) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()
        del model.get_submodule(self.place).qlora_kit_prompt

    def _look(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self._labels = kwargs.get("labels")

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the positions among the tokens; behind a cache that has them only move these."""
        self._places = None
        if not self.enabled:
            return None
        call = as_keywords(module, args, kwargs)
        batch, length, device = call_size(call)
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        virtual = self.config.length
        if cached_tokens(call) > 0:
            if isinstance(mask, Tensor) and mask.ndim == 2:
                ones = mask.new_ones(mask.shape[0], virtual)
                infix = self.config.place == "infix"  # its padding is all on the left
                call["attention_mask"] = torch.cat([mask, ones] if infix else [ones, mask], dim=1)
            if positions is not None:
                call["position_ids"] = positions + virtual
            return (), call
        last = None
        if self.config.place == "infix":
            labels = announced_labels()
            labels = self._labels if labels is None else labels
            last = last_prompt_token(labels, mask, length).to(device)
        self._labels = None
        places = self._places = _Places(virtual, length, last)
        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = _embeddings(module)(call.pop("input_ids"))
        ours = self.prompt.embedding.to(embeds.dtype).expand(batch, -1, -1)
        call["input_ids"], call["inputs_embeds"] = None, places.mix(ours, embeds)
        if isinstance(mask, Tensor) and not is_marker(mask):
            if mask.ndim != 2:
                raise AdapterError("prompt-tuning takes masks of (B, T), not packed rows.")
            call["attention_mask"] = places.mix(mask.new_ones(batch, virtual), mask)
        if positions is not None:
            call["position_ids"] = self._moved(positions, places, last, batch)
        if call.get("token_type_ids") is not None:
            kinds = call["token_type_ids"]
            call["token_type_ids"] = places.mix(kinds.new_zeros(batch, virtual), kinds)
        return (), call

    def _moved(self, positions: Tensor, places: _Places, last: Tensor | None, batch: int) -> Tensor:
        positions = positions.expand(batch, -1)
        if positions.device.type == "cpu" and bool((positions.diff(dim=1) < 0).any()):
            raise AdapterError("prompt-tuning cannot stand in front of packed rows.")
        ours = torch.arange(self.config.length, device=positions.device)[None].expand(batch, -1)
        if last is not None:
            ours = ours + 1 + _gather(positions, last)
        return places.mix(ours, positions + places.moved.to(positions.device))

    def _after(self, module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any) -> Any:
        """Take the positions out of the output again."""
        places = self._places  # kept: recomputed blocks ask for it in the backward pass
        if places is None:
            return output
        if isinstance(output, tuple):
            return (_gather(output[0], places.kept.to(output[0].device)), *output[1:])
        hidden = output.last_hidden_state
        output.last_hidden_state = _gather(hidden, places.kept.to(hidden.device))
        pooler = getattr(module, "pooler", None)
        if pooler is not None and output.get("pooler_output") is not None:
            output.pooler_output = pooler(output.last_hidden_state)
        return output

    def replaced(self, hidden: Tensor, index: int) -> Tensor:
        """The states (B, l + T, d) that enter block `index` + 1, those at the l positions ours."""
        assert self._places is not None
        assert self.prompt.states is not None
        ours = self.prompt.states[index].to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        where = self._places.virtual.to(hidden.device).expand(hidden.shape[0], -1)
        return hidden.scatter(1, where[..., None].expand_as(ours), ours)

    @property
    def in_first_pass(self) -> bool:
        """Whether the l positions are in the current forward pass, and not in a cache."""
        return self._places is not None

    def trainable(self) -> dict[str, nn.Parameter]:
        """The embeddings, and the states of PreLayer."""
        return {f"qlora_kit_prompt.{name}": p for name, p in self.prompt.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """The same."""
        return dict(self.trainable())

    def sizes(self) -> dict[str, int]:
        """The model's sizes by the names in PEFT's file."""
        shape = self.shape
        sizes = {"token_dim": shape.width, "num_attention_heads": shape.kv_heads}
        return sizes | {"num_layers": shape.layers}

    def merge_delta(self) -> Tensor | None:
        """Refuse.

        Returns:
            Never.

        Raises:
            AdapterError: always.
        """
        raise AdapterError("a prompt is not a change of weights and cannot be merged.")


class _Replace:
    """The forward pre-hook of one block."""

    def __init__(self, piece: PromptPiece, index: int) -> None:
        self.piece, self.index = piece, index

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.piece.in_first_pass:
            return None
        if args:
            return (self.piece.replaced(args[0], self.index), *args[1:]), kwargs
        hidden = self.piece.replaced(kwargs["hidden_states"], self.index)
        return args, kwargs | {"hidden_states": hidden}
