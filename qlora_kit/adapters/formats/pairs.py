"""Tensors of a file, put together as the low-rank change of each module."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.core.errors import FormatError


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
