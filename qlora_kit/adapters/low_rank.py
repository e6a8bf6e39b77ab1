"""The low-rank change of one module as files hold it, with what a variant adds to A and B."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.adapters.config import AdaLoRA, DoRA, LoRA
from qlora_kit.core.errors import FormatError


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


def pair_up(
    pairs: Mapping[str, Mapping[str, Tensor]], config: LoRA, where: Path
) -> dict[str, LowRank]:
    """Put the tensors of a file together, module by module.

    Args:
        pairs: module to key to tensor.
        config: of the file, which says what belongs together and of which rank.
        where: the file, for messages.

    Returns:
        Module to its change.

    Raises:
        FormatError: tensors are missing, too many, or contradict the configuration.

    Example:
        >>> pairs = {"proj": {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(4, 2)}}
        >>> pair_up(pairs, LoRA(rank=2, alpha=4), Path("file"))["proj"].scale
        2.0
    """
    if not pairs:
        raise FormatError(f"{where} holds no lora_A and lora_B pair.")
    deltas = {}
    for module, pair in pairs.items():
        wanted = {"lora_A", "lora_B"} | ({"lora_magnitude"} if isinstance(config, DoRA) else set())
        if isinstance(config, AdaLoRA):
            wanted.add("lora_E")
        if "lora_embedding_A" in pair:
            wanted = {"lora_embedding_A", "lora_embedding_B"}
        if pair.keys() != wanted:
            raise FormatError(
                f"{where}: {module} has {' and '.join(sorted(pair))} where "
                f"{' and '.join(sorted(wanted))} belong."
            )
        found = LowRank.of(pair, config.scale_of(module))
        a, b, values = found.a, found.b, found.values
        rank = config.rank_of(module) if values is None else min(config.rank, values.numel())
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise FormatError(
                f"{where}: {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, but "
                f"its rank is {rank} by its configuration; expected (r, in) and (out, r)."
            )
        if values is not None and values.shape != (rank, 1):
            raise FormatError(f"{where}: {module} has lora_E {tuple(values.shape)}, not {rank, 1}.")
        magnitude = found.magnitude
        if magnitude is not None and magnitude.shape != b.shape[:1]:
            raise FormatError(
                f"{where}: {module} has a lora_magnitude_vector {tuple(magnitude.shape)} beside "
                f"lora_B {tuple(b.shape)}; expected ({b.shape[0]},)."
            )
        for tensor in pair.values():
            dtype_name(tensor.dtype, where)
        deltas[module] = found
    return deltas


def dtype_name(dtype: torch.dtype, where: Path) -> str:
    """Name the dtype of an adapter's tensors.

    Args:
        dtype: of a tensor.
        where: its file, for messages.

    Returns:
        Without `torch.`.

    Raises:
        FormatError: it is none that adapters are saved in.

    Example:
        >>> dtype_name(torch.float32, Path("file"))
        'float32'
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise FormatError(
            f"{where}: tensors are {name}; expected float32, bfloat16 or float16. Save the "
            "adapter again in one of these."
        )
    return name
