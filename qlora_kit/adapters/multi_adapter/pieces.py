"""A module under several adapters: the base once, and what each adapter changes there.

A piece holds the changes of the adapters that act at its place and answers as it is told:
with the base alone, with one adapter for all rows, or with another for each row. It has what
files hold, A, B and s (`low_rank`), whatever method they came from; nothing here is trained.
With one adapter the arithmetic is that of `LoRALinear`, `LoRAEmbedding` and
`protocol.TrainedCopy`, bit for bit.
"""

import copy
from collections.abc import Mapping
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.adapters.linears import linear_shape
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.multi_adapter.batch_rows import BatchRows, Mixed
from qlora_kit.adapters.protocol import EmbeddingWrapper, LinearWrapper, ModuleWrapper
from qlora_kit.core.errors import AdapterError
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.autocast import autocast_dtype


class HeldPair(nn.Module):
    """One adapter's A and B at one place, frozen. Named so that all know them for an adapter's."""

    def __init__(self, pair: LowRank, device: torch.device) -> None:
        """Copy a pair to the module's device, in its own dtype."""
        super().__init__()
        self.lora_A = nn.Parameter(pair.a.detach().to(device, copy=True), requires_grad=False)
        self.lora_B = nn.Parameter(pair.b.detach().to(device, copy=True), requires_grad=False)
        self.scale = pair.scale
        self.embedding = pair.embedding

    def low_rank(self) -> LowRank:
        """Describe it as files do; tensors are shared."""
        return LowRank(self.lora_A, self.lora_B, self.scale, embedding=self.embedding)


def is_pair(held: nn.Module | None) -> TypeGuard[HeldPair]:
    """Tell a low-rank change from a copy of a module, or from nothing."""
    return isinstance(held, HeldPair)


def held_copy(
    base: nn.Module, place: str, values: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """Make a frozen copy of a module with the values an adapter was saved with.

    Args:
        base: the module.
        place: its name, for messages.
        values: name to value, of all parameters and buffers.
        dtype: of the copy.

    Returns:
        The copy, on the base's device.

    Raises:
        AdapterError: the values are of another module.

    Example:
        >>> held_copy(nn.Linear(4, 2), "head", {"bias": torch.ones(2)}, torch.float32)
        Traceback (most recent call last):
        qlora_kit.core.errors.AdapterError: head is saved with bias (2,), but the model has ...
    """
    have = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    came = {name: tuple(value.shape) for name, value in values.items()}
    if have != came:
        saved, own = (", ".join(f"{n} {s}" for n, s in x.items()) for x in (came, have))
        raise AdapterError(f"{place} is saved with {saved}, but the model has {own}.")
    made = copy.deepcopy(base).to(dtype)
    made.load_state_dict(values)
    return made.requires_grad_(False)


class SharedPiece(ModuleWrapper):
    """What the three kinds have in common: who is held here, and who answers."""

    def __init__(self, base: nn.Module, place: str) -> None:
        super().__init__(base, place)
        self.held = nn.ModuleList()
        self.names: list[str] = []
        self._one: str | None = None
        self._rows: BatchRows | None = None

    def hold(self, name: str, module: nn.Module) -> None:
        """Add what one adapter changes here."""
        self.names.append(name)
        self.held.append(module)

    def drop(self, name: str) -> None:
        """Forget an adapter, if it acts here."""
        if name in self.names:
            number = self.names.index(name)
            del self.names[number], self.held[number]

    def choose(self, answering: str | BatchRows | None) -> None:
        """Decide who answers from now on.

        Args:
            answering: one adapter for all rows, None for the base, or who answers each row.
        """
        self._one = self._rows = None
        if isinstance(answering, BatchRows):
            found = set(answering.names)
            if len(found) > 1 and found & set(self.names):
                self._rows = answering
                return
            answering = answering.names[0]  # for all the same, as far as this place knows
        if answering in self.names:
            self._one = answering

    def held_by(self, name: str) -> nn.Module | None:
        """What an adapter holds here, or None."""
        return self.held[self.names.index(name)] if name in self.names else None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Nothing: several adapters answer, and one at a time is trained (`inject.attach`)."""
        return {}


class SharedLowRank(SharedPiece):
    """The low-rank changes of several adapters at one place, put together when needed."""

    def __init__(self, base: nn.Module, place: str) -> None:
        super().__init__(base, place)
        self._ready: dict[tuple[torch.dtype, torch.device], LowRank | Mixed] = {}

    def choose(self, answering: str | BatchRows | None) -> None:
        """Decide who answers; what was put together for another choice is let go."""
        self._ready = {}
        super().choose(answering)

    def pair(self, name: str) -> LowRank | None:
        """An adapter's change of this module, tensors shared; None where it makes none."""
        held = self.held_by(name)
        return held.low_rank() if isinstance(held, HeldPair) else None

    def change(self, dtype: torch.dtype, device: torch.device) -> LowRank | Mixed | None:
        """What answers besides the base, ready for a dtype; None while the base is alone."""
        if not self.enabled or (self._one is None and self._rows is None):
            return None
        ready = self._ready.get((dtype, device))
        if ready is None:
            ready = self._make(dtype)
            self._ready[dtype, device] = ready
        return ready

    def _make(self, dtype: torch.dtype) -> LowRank | Mixed:
        if self._rows is None:
            one = self.pair(str(self._one))
            assert one is not None
            return LowRank(one.a.to(dtype), one.b.to(dtype), one.scale)
        found = {name: self.pair(name) for name in dict.fromkeys(self._rows.names) if name}
        pairs = {name: pair for name, pair in found.items() if pair is not None}
        return Mixed(self._rows, pairs, self.place, dtype)

    def merge_delta(self) -> Tensor | None:
        """Compute s·B·A of the adapter in use.

        Returns:
            (out, in) float32; None while the base is alone.

        Raises:
            AdapterError: rows have different adapters.
        """
        if self._rows is not None:
            raise AdapterError("rows of different adapters make no single change of the weight.")
        pair = None if self._one is None else self.pair(self._one)
        return None if pair is None else pair.delta()


class SharedLinear(SharedLowRank, LinearWrapper):
    """A linear under several adapters; takes the linear's place in the model.

    Example:
        >>> linear = nn.Linear(8, 4)
        >>> shared = SharedLinear(linear, "proj")
        >>> pair = LowRank(torch.ones(2, 8), torch.ones(4, 2), 0.5)
        >>> shared.hold("one", HeldPair(pair, torch.device("cpu")))
        >>> shared.choose("one")
        >>> x = torch.ones(3, 8)
        >>> (shared(x) - linear(x)).mean().round().item()
        8.0
    """

    def __init__(self, base: nn.Module, place: str) -> None:
        """Wrap one linear.

        Args:
            base: one of `linears.LINEARS`. Not modified.
            place: its dotted name in the model.
        """
        super().__init__(base, place)
        self.out_features, self.in_features = linear_shape(base)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base, once for all rows, and what answers besides it.

        Args:
            x: (..., K), the rows of the batch in front where they have different adapters.

        Returns:
            (..., N) in the dtype the base answers with.
        """
        change = self.change(autocast_dtype(x.device) or x.dtype, x.device)
        if change is None:
            return self.base(x)
        if isinstance(change, Mixed):
            return change.add(self.base(x), x)
        if isinstance(self.base, NF4Linear):
            return self.base(x, change.a, change.b, change.scale)
        y = self.base(x)
        z = F.linear(x, change.a).reshape(-1, change.a.shape[0])
        rows = y.reshape(-1, self.out_features)
        return torch.addmm(rows, z, change.b.T, alpha=change.scale).view(y.shape)


class SharedEmbedding(SharedLowRank, EmbeddingWrapper):
    """An embedding under several adapters; takes the embedding's place in the model.

    Example:
        >>> shared = SharedEmbedding(nn.Embedding(10, 4), "embed")
        >>> shared(torch.tensor([[1, 7]])).shape
        torch.Size([1, 2, 4])
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up.

        Args:
            ids: (rows, tokens) int64.

        Returns:
            (*ids.shape, H) in the dtype the base answers with.
        """
        y: Tensor = self.base(ids)
        change = self.change(y.dtype, y.device)
        if change is None:
            return y
        if isinstance(change, Mixed):
            (a, b), scale = change.side_by_side, 1.0
            tokens = change.rows.tokens_of(ids[..., None], self.place)
            z = change.own_columns(F.embedding(ids, a.T), tokens).view(*ids.shape, -1)
        else:
            a, b, scale = change.a, change.b, change.scale
            z = F.embedding(ids, a.T)
        added = (z @ b.T).mul(scale)
        factor = getattr(self.base, "embed_scale", None)
        if factor is not None:
            added = added * factor.to(added.dtype)
        return y + added.to(y.dtype)


class SharedModule(SharedPiece):
    """A module that adapters trained whole, a classifier's head say: a copy for each of them.

    Rows of different adapters go through one copy after the other, each with its own rows.

    Example:
        >>> shared = SharedModule(nn.Linear(4, 2), "classifier")
        >>> shared(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Answer with the copies in use, or with the base.

        Args:
            x: what the base takes.

        Returns:
            What the base returns.
        """
        if not self.enabled or self._rows is None:
            return self._answer(self._one if self.enabled else None, x)
        tokens = self._rows.tokens_of(x if x.is_floating_point() else x[..., None], self.place)
        flat = x.shape[0] != len(self._rows.names)
        rows = x.reshape(len(self._rows.names), tokens, *x.shape[1:]) if flat else x
        owners = [name if name in self.names else None for name in self._rows.names]
        y: Tensor | None = None
        for owner in dict.fromkeys(owners):
            numbers = [number for number, name in enumerate(owners) if name == owner]
            own = torch.tensor(numbers, device=x.device)
            part = rows[own]
            answer = self._answer(owner, part.flatten(0, 1) if flat else part)
            answer = answer.unflatten(0, (-1, tokens)) if flat else answer
            y = answer.new_empty(len(owners), *answer.shape[1:]) if y is None else y
            y[own] = answer
        assert y is not None
        return y.flatten(0, 1) if flat else y

    def _answer(self, name: str | None, x: Tensor) -> Tensor:
        trained = None if name is None else self.held_by(name)
        if trained is None:
            return self.base(x)
        first = next(trained.parameters())
        if not x.is_floating_point():  # token ids of an embedding
            return trained(x).to(next(self.base.parameters()).dtype)
        return trained(x.to(first.dtype)).to(x.dtype)
