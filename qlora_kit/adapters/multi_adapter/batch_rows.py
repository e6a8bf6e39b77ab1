"""Which adapter answers which row of a batch, and the low-rank product of such a batch.

With y = base(x) for all rows at once, row i of adapter k adds s_k·(x_i A_kᵀ) B_kᵀ. Two forms
compute that for a whole batch; neither goes through rows, or adapters, one by one:

- *masked*: with A the A_k of all adapters that occur, one below the other, (R, K), and B
  their s_k·B_k side by side, (N, R): z = x Aᵀ, z is set to zero outside the columns of each
  row's own adapter, y + z Bᵀ. Two products, every A_k and B_k read once, but R/r times the
  multiplications of one adapter.
- *grouped*: each row's own A and B are gathered, (rows, r, K) and (rows, N, r), smaller ranks
  filled up with zeros, and two batched products follow: the multiplications of one adapter
  however many there are, and a copy of r·(K + N) values for each row.

With T tokens in each row masked takes about T·R/r, grouped 1.2·T and 14 for the copies, in
units of one adapter's time for one token (a CPU core, float32, K = N = 1024, r = 16;
`python -m benchmarks.ops.adapter_rows`): so CPUs take the masked form to decode and the grouped
one to read a prompt. On a GPU up to 128 columns are one tile of a product that is bound by
reading x, so that the masked form should be free up to there; and while decoding A and B are
what is read, where masked alone reads each of them once.

Values outside a row's columns are replaced, not multiplied by zero: an adapter whose product
overflows spoils its own rows alone.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.core.errors import AdapterError

Form = Literal["auto", "masked", "grouped"]

COPY_COST = 14.0
"""Tokens of one adapter that copying its A and B for a row costs on a CPU."""
BATCHED_COST = 1.2
"""Time of batched small products on a CPU, over that of the same in one product."""
FREE_COLUMNS = 128
"""Columns of z that cost a GPU as much as one adapter's."""
LONG_ROW = 32
"""Tokens of a row from which on a GPU does not notice the copies of A and B."""


class BatchRows:
    """The adapter of every row, and the sizes of the batch that the model is working on.

    Example:
        >>> rows = BatchRows(("french", None), repeat=2)
        >>> rows.names
        ('french', 'french', None, None)
        >>> rows.tokens_of(torch.ones(4, 7, 8), "proj")
        7
    """

    def __init__(
        self, names: Sequence[str | None], *, repeat: int = 1, form: Form = "auto"
    ) -> None:
        """Take down who answers.

        Args:
            names: adapter of each row of the input; None: the base.
            repeat: consecutive rows that `generate` makes of each.
            form: how to compute.

        Raises:
            AdapterError: there is no row.
        """
        if not names or repeat < 1:
            raise AdapterError(
                f"rows() needs a name, or None, for each row of the batch and a positive repeat, "
                f"got {len(names)} names and repeat={repeat}."
            )
        self.names = tuple(name for name in names for _ in range(repeat))
        self.form = form
        self.tokens: int | None = None
        """Of each row, in the forward that is running; None before the first."""
        self._others: dict[tuple[tuple[tuple[str, int], ...], torch.device], Tensor] = {}

    def watch(self, model: nn.Module) -> RemovableHandle:
        """Check every batch that enters a model, before it computes anything.

        Args:
            model: the whole model.

        Returns:
            A handle whose `remove` ends it.
        """
        return model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batch = next((value for value in inputs if isinstance(value, Tensor)), None)
        if batch is None:
            return
        if batch.shape[0] != len(self.names):
            raise AdapterError(
                f"the batch has {batch.shape[0]} rows, and rows() was given {len(self.names)} "
                "names. Give one for each row, None for the base; where generate() makes several "
                "answers of a row, say rows(names, repeat=num_beams) or num_return_sequences."
            )
        self.tokens = batch.shape[1] if batch.dim() > 1 else None

    def tokens_of(self, x: Tensor, place: str) -> int:
        """Find how many consecutive vectors of a module's input belong to each row.

        Args:
            x: (rows, ..., K), or (rows · tokens, K).
            place: of the module, for messages.

        Returns:
            Their number.

        Raises:
            AdapterError: the input cannot be told apart by rows.
        """
        count = len(self.names)
        flat = x.dim() == 2 and self.tokens is not None and x.shape[0] == count * self.tokens
        if not flat and (x.dim() < 2 or x.shape[0] != count):
            raise AdapterError(
                f"{place} gets an input of shape {tuple(x.shape)}, which does not show the "
                f"{count} rows of the batch. Rows of different adapters need one row of the input "
                "for each; answer packed or reordered rows with one adapter at a time."
            )
        if flat:
            assert self.tokens is not None
            return self.tokens
        return x[0].numel() // x.shape[-1]

    def others(self, ranks: tuple[tuple[str, int], ...], device: torch.device) -> Tensor:
        """Tell which columns belong to other adapters than the row's.

        Args:
            ranks: adapter and number of columns, from left to right.
            device: of the result.

        Returns:
            (rows, 1, R) bool. Kept: modules of the same ranks share it.

        Example:
            >>> rows = BatchRows(("a", None))
            >>> rows.others((("a", 1), ("b", 2)), torch.device("cpu")).tolist()
            [[[False, True, True]], [[True, True, True]]]
        """
        known = self._others.get((ranks, device))
        if known is None:
            columns = [name for name, rank in ranks for _ in range(rank)]
            table = [[name != own for name in columns] for own in self.names]
            known = torch.tensor(table, device=device)[:, None]
            self._others[ranks, device] = known
        return known


class Mixed:
    """What rows of different adapters add to the output of one linear or embedding.

    Example:
        >>> pairs = {"a": LowRank(torch.ones(1, 2), torch.ones(3, 1), 0.5)}
        >>> mixed = Mixed(BatchRows(("a", None)), pairs, "proj", torch.float32)
        >>> mixed.add(torch.zeros(2, 1, 3), torch.ones(2, 1, 2)).tolist()
        [[[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]]]
    """

    def __init__(
        self, rows: BatchRows, pairs: Mapping[str, LowRank], place: str, dtype: torch.dtype
    ) -> None:
        """Remember; A and B are put together by the first batch.

        Args:
            rows: who answers.
            pairs: adapter to its change of this module, for those that occur and have one.
            place: the module's name, for messages.
            dtype: that the products run in.
        """
        self.rows = rows
        self.pairs = dict(pairs)
        self.place = place
        self.dtype = dtype
        self.ranks = tuple((name, pair.a.shape[0]) for name, pair in pairs.items())
        self.most = max(rank for _, rank in self.ranks)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add every row's low-rank product to a linear's output.

        Args:
            y: (..., N), the base's output. Overwritten where no gradient is recorded.
            x: (..., K), its input, with the rows in front.

        Returns:
            (..., N).
        """
        tokens = self.rows.tokens_of(x, self.place)
        if self.takes_grouped(tokens, x.device):
            return self._grouped(y, x.to(self.dtype), tokens)
        a, b = self.side_by_side
        z = self.own_columns(F.linear(x.to(self.dtype), a), tokens).view(-1, a.shape[0])
        rows = y.reshape(-1, y.shape[-1])
        added = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
        return added(rows, z, b.T).view(y.shape)

    def takes_grouped(self, tokens: int, device: torch.device) -> bool:
        """Decide between the two forms.

        Args:
            tokens: of each row.
            device: that computes.

        Returns:
            True for the grouped one.

        Example:
            >>> pair = LowRank(torch.ones(16, 2), torch.ones(3, 16), 0.5)
            >>> pairs = {"a": pair, "b": pair}
            >>> mixed = Mixed(BatchRows(("a", "b")), pairs, "proj", torch.float32)
            >>> [mixed.takes_grouped(tokens, torch.device("cpu")) for tokens in (1, 512)]
            [False, True]
        """
        if self.rows.form != "auto":
            return self.rows.form == "grouped"
        columns = sum(rank for _, rank in self.ranks)
        if device.type == "cuda":
            return columns > FREE_COLUMNS and tokens >= LONG_ROW
        return tokens * (columns / self.most - BATCHED_COST) > COPY_COST

    def own_columns(self, z: Tensor, tokens: int) -> Tensor:
        """Set what other rows' adapters gave to zero.

        Args:
            z: R values for every token; overwritten where no gradient is recorded.
            tokens: of each row.

        Returns:
            (rows, tokens, R).
        """
        z = z.reshape(len(self.rows.names), tokens, -1)
        filled = torch.masked_fill if torch.is_grad_enabled() else Tensor.masked_fill_
        return filled(z, self.foreign, 0.0)

    def _grouped(self, y: Tensor, x: Tensor, tokens: int) -> Tensor:
        a, b, index, without = self.stacked
        count = len(self.rows.names)
        z = torch.bmm(x.reshape(count, tokens, -1), a[index].mT)
        if without is not None:
            z = z.masked_fill(without, 0.0)
        rows = y.reshape(count, tokens, -1)
        added = torch.baddbmm if torch.is_grad_enabled() else Tensor.baddbmm_
        return added(rows, z, b[index].mT).view(y.shape)

    @cached_property
    def foreign(self) -> Tensor:
        """(rows, 1, R) bool: columns of z that belong to other rows' adapters."""
        device = next(iter(self.pairs.values())).a.device
        return self.rows.others(self.ranks, device)

    @cached_property
    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """(R, K) all A, one below the other, and (N, R) all s·B, side by side."""
        a = torch.cat([pair.a.to(self.dtype) for pair in self.pairs.values()])
        return a, torch.cat([self._scaled(pair) for pair in self.pairs.values()], 1)

    @cached_property
    def stacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All A (D, r, K) and s·B (D, N, r) of D adapters, zeros below smaller ranks.

        Then each row's number among them, and (rows, 1, 1) where there is none.
        """
        gaps = {name: self.most - rank for name, rank in self.ranks}
        pairs = self.pairs.items()
        a = torch.stack([F.pad(p.a.to(self.dtype), (0, 0, 0, gaps[n])) for n, p in pairs])
        b = torch.stack([F.pad(self._scaled(p), (0, gaps[n])) for n, p in pairs])
        numbers = {name: number for number, name in enumerate(self.pairs)}
        index = torch.tensor([numbers.get(str(n), 0) for n in self.rows.names], device=a.device)
        without = torch.tensor([n not in numbers for n in self.rows.names])
        return a, b, index, without.to(a.device).view(-1, 1, 1) if without.any() else None

    def _scaled(self, pair: LowRank) -> Tensor:
        return (pair.b.float() * pair.scale).to(self.dtype)
