"""The structures of a GLoRA super-net: which count now, drawn at random, counted."""

import random
from collections.abc import Sequence

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.glora.config import FORMS, Structure
from qlora_kit.adapters.glora.layer import GLoRALinear
from qlora_kit.core.errors import AdapterError

Candidate = tuple[Structure, ...]
"""One structure per linear, in the adapter's order."""


def super_net_pieces(adapter: AttachedAdapter) -> list[GLoRALinear]:
    """The linears of a super-net.

    Args:
        adapter: attached.

    Returns:
        In the model's order.

    Raises:
        AdapterError: it is no super-net.

    Example:
        >>> from torch import nn
        >>> from qlora_kit.adapters.glora.config import GLoRA
        >>> from qlora_kit.adapters.inject import attach
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> [p.place for p in super_net_pieces(attach(model, GLoRA(super_net=True)))]
        ['layers.0']
    """
    pieces = [p for p in adapter.pieces if isinstance(p, GLoRALinear) and p.super_net]
    if not pieces:
        raise AdapterError(
            f"{adapter!r} is no GLoRA super-net. Attach GLoRA(super_net=True) and train it first."
        )
    return pieces


def draw(generator: random.Random) -> Structure:
    """Draw one of the 432 structures, each as likely.

    Args:
        generator: of the draw.

    Returns:
        The structure.

    Example:
        >>> str(draw(random.Random(0)))
        'none none lora scalar none'
    """
    return Structure(*(generator.choice(forms) for forms in FORMS.values()))


def draw_structures(pieces: Sequence[GLoRALinear], seed: int, update: int, batch: int) -> None:
    """Let every linear of a super-net use a structure drawn for one batch.

    Args:
        pieces: of the super-net; their `choice` is set.
        seed: the run's.
        update: number of the update.
        batch: number of the batch within it. All three decide alone: a resumed run draws
            what the whole run would have.
    """
    generator = random.Random(f"{seed}:{update}:{batch}")
    for piece in pieces:
        piece.choice = draw(generator).on(bias=piece.has_bias)


def use(pieces: Sequence[GLoRALinear], structures: Candidate) -> None:
    """Let every linear of a super-net use a given structure.

    Args:
        pieces: of the super-net; their `choice` is set.
        structures: one per piece.
    """
    for piece, structure in zip(pieces, structures, strict=True):
        piece.choice = structure


def count_values(pieces: Sequence[GLoRALinear], structures: Candidate) -> int:
    """Count what would be trained with given structures, a classifier's head not counted.

    Args:
        pieces: of the super-net.
        structures: one per piece.

    Returns:
        The sum over the linears.

    Example:
        >>> from torch import nn
        >>> from qlora_kit.adapters.glora.config import GLoRA
        >>> piece = GLoRALinear(nn.Linear(8, 4), "proj", GLoRA(rank=2), seed=0)
        >>> count_values([piece], (Structure.parse("none lora none none scalar"),))
        25
    """
    pairs = zip(pieces, structures, strict=True)
    return sum(
        structure.count(p.out_features, p.in_features, rank=p.rank, bias=p.has_bias)
        for p, structure in pairs
    )
