"""GLoRA's super-net in the loop, and what comes after: the search and the adapter cut out.

    adapter = attach(model, GLoRA(super_net=True))      # 1. every structure shares values
    Trainer(model, adapter, ...).train()                #    one is drawn per linear and batch
    found = search_structures(model, adapter, batches, limit=200_000)       # 2. on validation rows
    adapter = cut_out(model, adapter, found)            # 3. the best alone; train on, save, merge

The authors stop there: the structures that were found keep the super-net's values, and nothing
is trained after the search. `qlora-kit search` does 2 and 3.

The draws of a batch depend on seed, update and the batch's number within it alone, so that a
resumed run draws what the whole one would have. Outside of training steps (evaluation, saving)
a super-net uses the largest structure.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.glora.layer import GLoRALinear
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.protocol import TrainedCopy, stored_state
from qlora_kit.adapters.super_net.search import Found, SearchResult, SearchSettings, search
from qlora_kit.adapters.super_net.structures import (
    Candidate,
    draw_structures,
    super_net_pieces,
    use,
)
from qlora_kit.train.held_out import loss_totals


@dataclass(slots=True)
class StructureDraws:
    """Which structures a super-net uses for a batch; nothing for other adapters.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> adapter = attach(model, GLoRA(super_net=True))
        >>> with StructureDraws().drawn(adapter, seed=1, update=0):
        ...     inside = adapter.pieces[0].choice
        >>> str(inside), adapter.pieces[0].choice == adapter.pieces[0].structure
        ('lora none vector scalar scalar', True)
    """

    update: int = -1
    """The update of the last batch."""
    batch: int = 0
    """Its number within the update."""

    @contextmanager
    def drawn(self, adapter: AttachedAdapter, *, seed: int, update: int) -> Iterator[None]:
        """Draw structures for one batch, forward and backward.

        Args:
            adapter: of any method.
            seed: the run's.
            update: how many updates were made before.

        Yields:
            Nothing.
        """
        config = adapter.config
        if not (isinstance(config, GLoRA) and config.super_net):
            yield
            return
        self.batch = self.batch + 1 if update == self.update else 0
        self.update = update
        pieces = super_net_pieces(adapter)
        draw_structures(pieces, seed, update, self.batch)
        try:
            yield
        finally:
            use(pieces, tuple(piece.structure for piece in pieces))


def search_structures(
    model: PreTrainedModel,
    adapter: AttachedAdapter,
    batches: Iterable[dict[str, Any]],
    *,
    limit: int,
    settings: SearchSettings | None = None,
    watch: Callable[[Found], None] | None = None,
) -> SearchResult:
    """Search a trained super-net for the structures with the lowest loss on validation rows.

    Args:
        model: with the super-net on it.
        adapter: the super-net.
        batches: collated *validation* rows with `labels`; read once and kept.
        limit: most trained values, a classifier's head not counted.
        settings: sizes; None: the authors'.
        watch: called with every candidate once it is measured.

    Returns:
        The best structures, and how the search went.

    Raises:
        AdapterError: the adapter is no super-net.
        ConfigError: the limit is below 0.

    Example:
        >>> search_structures.__name__  # a whole use: tests/train/test_glora.py
        'search_structures'
    """
    rows = list(batches)

    def loss() -> float:
        return _loss(model, rows)

    return search(adapter, loss, limit=limit, settings=settings, watch=watch)


def loss_of(
    model: PreTrainedModel,
    adapter: AttachedAdapter,
    batches: Iterable[dict[str, Any]],
    structures: Candidate | None = None,
) -> float:
    """Measure one structure of a super-net, or of any adapter as it is.

    Args:
        model: with the adapter on it.
        adapter: a super-net where structures are given.
        batches: collated rows with `labels`.
        structures: one per linear; they count while it is measured. None: what counts now.

    Returns:
        Mean cross-entropy in nats, per token or per row of a classifier.

    Raises:
        AdapterError: the adapter is no super-net.

    Example:
        >>> loss_of.__name__  # a whole use: tests/train/test_glora.py
        'loss_of'
    """
    if structures is None:
        return _loss(model, batches)
    pieces = super_net_pieces(adapter)
    before = tuple(piece.choice for piece in pieces)
    use(pieces, structures)
    try:
        return _loss(model, batches)
    finally:
        use(pieces, before)


def _loss(model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> float:
    causal = "SequenceClassification" not in type(model).__name__
    return loss_totals(model, batches, causal=causal).metrics()["loss"]


def cut_out(
    model: PreTrainedModel, adapter: AttachedAdapter, found: SearchResult
) -> AttachedAdapter:
    """Replace a super-net on a model by an adapter of the structures that were found.

    Args:
        model: with the super-net on it.
        adapter: the super-net; it is detached.
        found: of a search in it.

    Returns:
        The new adapter, attached: it computes what the super-net did with these structures.

    Raises:
        AdapterError: the adapter is no super-net.

    Example:
        >>> cut_out.__name__  # a whole use: tests/train/test_glora.py
        'cut_out'
    """
    config = adapter.config
    assert isinstance(config, GLoRA)
    pieces = dict(zip(found.modules, super_net_pieces(adapter), strict=True))
    chosen = dict(zip(found.modules, found.best.structures, strict=True))
    heads = stored_state(piece for piece in adapter.pieces if isinstance(piece, TrainedCopy))
    adapter.detach_from_model()
    small = attach(model, found.config(config), name=adapter.name)
    with torch.no_grad():
        for piece in small.pieces:
            if isinstance(piece, GLoRALinear):
                values = pieces[piece.place].cut(chosen[piece.place])
                for name, parameter in piece.supports.items():
                    parameter.copy_(values[name])
        own = stored_state(piece for piece in small.pieces if isinstance(piece, TrainedCopy))
        for name, tensor in own.items():
            tensor.copy_(heads[name])
    return small
