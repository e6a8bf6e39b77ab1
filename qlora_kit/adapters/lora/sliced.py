"""LoRA on some outputs of a fused linear, each with an A of its own: the reference's MergedLinear.

GPT-2's `c_attn` and Phi-3's `qkv_proj` compute q, k and v in one linear. LoRA on the whole
has one A for the three; adapting q and v as the paper does on models that keep them apart
means, for the slice j of the outputs,

    y_j = x W_jᵀ + s (x A_jᵀ) B_jᵀ       A_j (r, K), B_j (n_j, r);  other slices: the base

`slices` of the configuration says which, by the pattern of a module: `c_attn: [q, v]`. The
layouts known are those of `c_attn` (q, k, v of equal width), `qkv_proj` (q and, narrower with
grouped-query attention, k and v) and `gate_up_proj` (gate, up). Rank and scale count for
each slice.

A_j lie on top of each other, B_j are the blocks of a block-diagonal B whose other rows are
zero, so the whole is one LoRA of rank r times the number of slices: that is how it is computed,
in the base's one pass, how it merges, and how a file holds it, for PEFT and all others, with
zeros in B. `qlora_kit.json` records the slices, so that training goes on here with the zeros
staying zeros.

Defaults: LoRA's, rank 16 and alpha 32, for each slice; no linear is sliced unless `slices` says so.

Source: arXiv:2106.09685, its reference code (`loralib.MergedLinear`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora_kit.adapters.linears import linear_shape
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.layer import FusibleLinear, Term, initial_a
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.core.errors import AdapterError

Span = tuple[int, int]
"""First output and the one after the last."""


def layout(model: nn.Module, place: str, module: nn.Module) -> dict[str, Span]:
    """Say which outputs of a fused linear belong together.

    Args:
        model: whose configuration tells the numbers of heads.
        place: the linear's dotted name.
        module: the linear.

    Returns:
        Slice to its outputs, in order.

    Raises:
        AdapterError: no such linear is known, or its size is another.

    Example:
        >>> layout(nn.Module(), "h.0.attn.c_attn", nn.Linear(4, 12))
        {'q': (0, 4), 'k': (4, 8), 'v': (8, 12)}
    """
    outputs, name = linear_shape(module)[0], place.rpartition(".")[2]
    config = getattr(model, "config", None)
    if name == "c_attn":
        widths = dict.fromkeys("qkv", outputs // 3)
    elif name == "gate_up_proj":
        widths = dict.fromkeys(("gate", "up"), outputs // 2)
    elif name == "qkv_proj" and config is not None:
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        narrow = head * config.num_key_value_heads
        widths = {"q": head * heads, "k": narrow, "v": narrow}
    else:
        raise AdapterError(
            f"slices: {place} is no fused linear whose layout is known (c_attn, qkv_proj, "
            "gate_up_proj). Leave it out of `slices`; LoRA on the whole works everywhere."
        )
    if sum(widths.values()) != outputs:
        raise AdapterError(
            f"slices: {place} has {outputs} outputs, and {widths} were expected by its name."
        )
    spans, start = {}, 0
    for part, width in widths.items():
        spans[part] = (start, start + width)
        start += width
    return spans


class SlicedLoRALinear(FusibleLinear):
    """A fused linear with low-rank branches on some of its slices; see the module's text.

    Attributes:
        slices: name to outputs of the adapted slices, in order.
        lora_A: (r times slices, K) in the master dtype.
        lora_B: (outputs of these slices, r) in the master dtype; zero at the start.

    Example:
        >>> linear = nn.Linear(4, 12)
        >>> slices = {"q": (0, 4), "v": (8, 12)}
        >>> adapted = SlicedLoRALinear(linear, "c_attn", LoRA(rank=2), slices, seed=0)
        >>> adapted.lora_A.shape, adapted.lora_B.shape
        (torch.Size([4, 4]), torch.Size([8, 2]))
    """

    def __init__(
        self,
        base: nn.Module,
        place: str,
        config: LoRA,
        slices: Mapping[str, Span],
        *,
        seed: int,
        rank: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Wrap one linear.

        Args:
            base: one of `linears.LINEARS`. Not modified.
            place: its dotted name in the model.
            config: rank, scale, dropout, start and dtype, by the patterns that match `place`.
            slices: the outputs to adapt, in order.
            seed: the run's.
            rank: instead of the configuration's, of each slice.
            scale: likewise.

        Raises:
            AdapterError: base is not a linear we know.
        """
        super().__init__(base, place, config, seed=seed, rank=rank, scale=scale)
        self.slices = dict(slices)
        like = self.lora_A
        if not like.is_meta:
            drawn = [
                initial_a(config, f"{place}.{name}", self.rank, self.in_features, seed)
                for name in self.slices
            ]
            a = torch.cat(drawn).to(like.device, like.dtype)
        else:
            a = like.new_empty(self.rank * len(self.slices), self.in_features)
        rows = sum(stop - start for start, stop in self.slices.values())
        self.lora_A = nn.Parameter(a.detach())
        self.lora_B = nn.Parameter(like.new_zeros(rows, self.rank).detach())

    @property
    def terms(self) -> list[Term]:
        """One for each slice."""
        found, row = [], 0
        for index, (start, stop) in enumerate(self.slices.values()):
            ranks, rows = self._columns_of(index), slice(row, row + stop - start)
            outputs = slice(start, stop)
            found.append(Term(self.lora_A, self.lora_B, self.scale, None, ranks, rows, outputs))
            row += stop - start
        return found

    @property
    def columns(self) -> int:
        """Of all slices."""
        return self.rank * len(self.slices)

    def pull_back(
        self, d_a: Tensor | None, d_b: Tensor | None, d_lengths: Tensor | None = None
    ) -> list[Tensor | None]:
        """Turn gradients of A and of the whole wide B into those of the masters.

        Args:
            d_a: (columns, K) float32, or None where it is not needed.
            d_b: (N, columns) float32, likewise; what is outside the blocks counts nowhere.
            d_lengths: None.

        Returns:
            As `masters`, in their dtypes; None for what is frozen.
        """
        return super().pull_back(d_a, None if d_b is None else torch.cat(self._blocks(d_b)))

    def _columns_of(self, index: int) -> slice:
        """Of a slice, in the wide B."""
        return slice(index * self.rank, (index + 1) * self.rank)

    def _blocks(self, wide: Tensor) -> list[Tensor]:
        """The blocks of a wide B, (outputs of a slice, r) each."""
        spans = enumerate(self.slices.values())
        return [wide[start:stop, self._columns_of(index)] for index, (start, stop) in spans]

    def wide_b(self) -> Tensor:
        """Lay the blocks of B out, (N, r times slices); differentiable."""
        r = self.rank
        wide = self.lora_B.new_zeros(self.out_features, r * len(self.slices))
        row = 0
        for index, (start, stop) in enumerate(self.slices.values()):
            block = self.lora_B[row : row + stop - start]
            wide[start:stop, index * r : (index + 1) * r] = block
            row += stop - start
        return wide

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and, unless switched off, the branches.

        Args:
            x: (..., K).

        Returns:
            (..., N) in the dtype the base answers with.
        """
        return self.with_pair(x, self.lora_A, self.wide_b()) if self.enabled else self.base(x)

    def low_rank(self) -> LowRank:
        """Describe the change as one of the summed rank."""
        return LowRank(self.lora_A, self.wide_b().detach(), self.scale)

    def own_state(self, pair: LowRank) -> dict[str, Tensor]:
        """Take the blocks out of what `low_rank` laid out.

        Args:
            pair: as saved.

        Returns:
            A and the narrow B.

        Raises:
            AdapterError: there is something beside the blocks.
        """
        rest = pair.b.clone()
        for block in self._blocks(rest):
            block.zero_()
        if rest.any():
            raise AdapterError(
                f"the saved lora_B of {self.place} is not zero outside the slices "
                f"{', '.join(self.slices)}. Remove qlora_kit.json to load it as plain LoRA."
            )
        return {"lora_A": pair.a, "lora_B": torch.cat(self._blocks(pair.b))}

    def merge_delta(self) -> Tensor:
        """Compute s·B·A, zero outside the slices.

        Returns:
            (N, K) float32, on the device of A.
        """
        return self.low_rank().delta().detach()
