"""The low-rank change of one module as files hold it, with what a variant adds to A and B."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """One module's change s·B·A, of DoRA with the length of every row.

    Example:
        >>> LowRank(torch.ones(1, 3), torch.ones(2, 1), 0.5).delta()
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r)."""
    scale: float
    """s."""
    magnitude: Tensor | None = None
    """DoRA's m, (out,): the length of every row of W + s·B·A once merged."""

    values: Tensor | None = None
    """AdaLoRA's λ, (r, 1): A is then diag(λ)·`a`."""
    embedding: bool = False
    """Whether it changes an embedding, whose weight is stored as (in, out)."""

    def named(self) -> dict[str, Tensor]:
        """Key to tensor, as the piece that owns them names them."""
        if self.embedding:
            return {"lora_embedding_A": self.a, "lora_embedding_B": self.b}
        pair = {"lora_A": self.a, "lora_B": self.b}
        if self.values is not None:
            pair["lora_E"] = self.values
        return pair if self.magnitude is None else pair | {"lora_magnitude": self.magnitude}

    def delta(self) -> Tensor:
        """Compute s·B·A, (out, in) float32: without `magnitude` the change of the weight."""
        pair = self.folded()
        return torch.mm(pair.b.float(), pair.a.float()).mul_(self.scale)

    def folded(self) -> "LowRank":
        """The same change as A and B alone: λ multiplied into A, rows of λ = 0 left out."""
        if self.values is None:
            return self
        kept = self.values.reshape(-1) != 0
        a = self.values[kept].float() * self.a[kept].float()
        return LowRank(a, self.b[:, kept].float(), self.scale, self.magnitude)

    @classmethod
    def of(cls, named: Mapping[str, Tensor], scale: float) -> "LowRank":
        """Put together what `named` gave.

        Args:
            named: key to tensor.
            scale: s.

        Returns:
            The pair.
        """
        if "lora_embedding_A" in named:
            return cls(named["lora_embedding_A"], named["lora_embedding_B"], scale, embedding=True)
        magnitude, values = named.get("lora_magnitude"), named.get("lora_E")
        return cls(named["lora_A"], named["lora_B"], scale, magnitude, values)
