"""What attention computes: the rule all layers of a kind share, and where documents lie.

`Call` is what decides which kernel serves: everything but the numbers and the lengths.

A row may hold several documents, one after the other. `Documents` says where each starts,
as transformers' `cu_seq_lens_q` and `max_length_q` do: counted over all B·T tokens of the
batch, on the device, so that no kernel and no mask needs the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """softmax(softcap(scale · q·kᵀ) + causal mask) · v.

    Example:
        >>> AttentionRule(scale=0.125).window is None
        True
    """

    scale: float
    """Factor on q·kᵀ; usually 1/√D."""
    window: int | None = None
    """How many tokens a query sees, itself included, as transformers' `sliding_window`."""
    softcap: float | None = None
    """c in c·tanh(score/c), after the scale (Gemma 2)."""
    deterministic: bool = False
    """Whether two runs must give the same bits."""

    def __post_init__(self) -> None:
        """Check what a model's configuration may get wrong."""
        if self.window is not None and self.window < 1:
            raise ShapeError(f"attention needs a window of at least 1 token, got {self.window}.")
        if self.softcap is not None and not self.softcap > 0:
            raise ShapeError(f"attention needs a softcap above 0, got {self.softcap}.")


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a packed batch lie. None of them crosses a row's end."""

    starts: Tensor
    """(n + 1,) int32: the first token of each document among all B·T, and B·T at the end.
    More B·T may follow, for a fixed shape: documents without tokens."""
    longest: int
    """Tokens of the longest one, or a larger number: time may grow with it."""

    @classmethod
    def from_positions(cls, position_ids: Tensor) -> "Documents":
        """Read documents off position ids: one starts with each row and at each position 0.

        Args:
            position_ids: (B, T) integers on the CPU.

        Returns:
            The documents, on the CPU; `to` moves them.

        Raises:
            ShapeError: position_ids are not (B, T), are empty, or are on a GPU, where
                reading them would make the host wait for it.

        Example:
            >>> documents = Documents.from_positions(torch.tensor([[0, 1, 0, 1, 2], [0] * 5]))
            >>> documents.starts.tolist(), documents.longest
            ([0, 2, 5, 6, 7, 8, 9, 10], 3)
        """
        if position_ids.dim() != 2 or not position_ids.numel() or position_ids.device.type != "cpu":
            raise ShapeError(
                "documents are read off (B, T) position ids on the CPU, got shape "
                f"{tuple(position_ids.shape)} on {position_ids.device}. Call this where the "
                "batch is collated, and move the result with `to`."
            )
        first = position_ids == 0
        first[:, 0] = True
        starts = first.flatten().nonzero().flatten()
        starts = torch.cat([starts, starts.new_tensor([position_ids.numel()])])
        return cls(starts.to(torch.int32), int(starts.diff().max()))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Documents":
        """The same documents with their starts on another device.

        Args:
            device: where to.
            non_blocking: let the host go on; the starts should be in pinned memory then.

        Returns:
            New documents.

        Example:
            >>> Documents(torch.tensor([0, 4], dtype=torch.int32), 4).to("cpu").longest
            4
        """
        return Documents(self.starts.to(device, non_blocking=non_blocking), self.longest)


@dataclass(frozen=True, slots=True)
class Call:
    """What the choice of a backend depends on."""

    device: torch.device
    """Of all tensors."""
    dtype: torch.dtype
    """Of q, k and v."""
    head_dim: int
    """D."""
    window: bool
    """Whether a query sees only so many tokens."""
    softcap: bool
    """Whether scores are capped."""
    deterministic: bool
    """Whether the bits must repeat."""
    documents: bool
    """Whether rows hold several documents, of different lengths."""
    single: bool
    """Whether rows hold one token each."""

    @classmethod
    def of(cls, q: Tensor, rule: AttentionRule, *, documents: bool) -> "Call":
        """Describe a call.

        Args:
            q: (B, T, Hq, D).
            rule: what to compute.
            documents: whether rows hold several documents, of different lengths.

        Returns:
            What decides about it.

        Example:
            >>> Call.of(torch.randn(1, 3, 2, 8), AttentionRule(scale=1.0), documents=False).head_dim
            8
        """
        return cls(
            device=q.device,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            window=rule.window is not None,
            softcap=rule.softcap is not None,
            deterministic=rule.deterministic,
            documents=documents,
            single=q.shape[1] == 1,
        )

    def __str__(self) -> str:
        """What is special about it, in words."""
        traits = ("window", "softcap", "deterministic", "documents", "single")
        special = [name for name in traits if getattr(self, name)]
        kind = str(self.dtype).removeprefix("torch.")
        return ", ".join([f"{kind} on {self.device.type}", f"head dim {self.head_dim}", *special])
