"""Variants of LoRA that are saved as plain LoRA: what PEFT is told, and what only we record.

PiSSA and slices have other ranks in a file than in training (see `lora.pissa` and `lora.sliced`),
LoftQ only another start. PEFT's file describes the tensors as they are; the field `own` of
`qlora_kit.json` holds the settings that training goes on with.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import FormatError

_OWN = ("rank", "alpha", "rank_pattern", "alpha_pattern", "init", "slices")


def own_fields(config: object) -> dict[str, Any]:
    """What `qlora_kit.json` records of a variant that PEFT's file calls LoRA.

    Args:
        config: of any method.

    Returns:
        JSON fields; none for other methods.

    Example:
        >>> own_fields(LoRA()), own_fields(LoRA(init="pissa"))["own"]["init"]
        ({}, 'pissa')
    """
    if not isinstance(config, LoRA) or not (config.init in ("pissa", "loftq") or config.slices):
        return {}
    return {"own": {key: value for key, value in asdict(config).items() if key in _OWN}}


def plain_config(config: LoRA, sizes: Mapping[str, tuple[int, float]]) -> LoRA:
    """Describe as plain LoRA what is saved with another rank than the method's.

    PiSSA and slices save more columns than they train; PEFT is told what it finds.

    Args:
        config: the method's.
        sizes: module to (rank, scale) as saved.

    Returns:
        A configuration with these ranks and scales; `config` itself where it has them.

    Example:
        >>> plain_config(LoRA(rank=2, alpha=4), {"a": (4, 2.0), "b": (4, 2.0)}).alpha
        8.0
    """
    own = {m: (config.rank_of(m), config.scale_of(m)) for m in sizes}
    if all(rank == own[m][0] for m, (rank, _) in sizes.items()):
        return config
    root = 0.5 if config.rslora else 1.0
    pairs = {m: (rank, scale * rank**root) for m, (rank, scale) in sizes.items()}
    rank, alpha = next(iter(pairs.values()))
    return replace(
        config,
        rank=rank,
        alpha=alpha,
        rank_pattern={m: r for m, (r, _) in pairs.items() if r != rank},
        alpha_pattern={m: a for m, (_, a) in pairs.items() if a != alpha},
    )


def with_own(config: LoRA, fields: Mapping[str, Any], *, where: Path) -> LoRA:
    """Put back what the side file says of a method that is saved as plain LoRA.

    Args:
        config: as PEFT's file has it.
        fields: of `qlora_kit.json`.
        where: the file, for messages.

    Returns:
        The configuration the adapter was trained with.

    Raises:
        FormatError: a field is malformed.

    Example:
        >>> with_own(LoRA(), {"own": {"rank": 2, "init": "pissa"}}, where=Path("x")).init
        'pissa'
    """
    own = fields.get("own")
    if own is None:
        return config
    try:
        known = {key: value for key, value in own.items() if key in _OWN}
        if "slices" in known:
            known["slices"] = {p: tuple(names) for p, names in known["slices"].items()}
        return replace(config, **known)
    except (AttributeError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}") from error
