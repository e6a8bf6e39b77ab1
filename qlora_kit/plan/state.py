"""What an update keeps and moves: the optimizer by its Transformers name, AdaLoRA's scores."""

from collections.abc import Collection, Sequence

from torch import nn

from qlora_kit.adapters.adalora.layer import AdaLoRALinear
from qlora_kit.core.errors import ConfigError
from qlora_kit.optim.bnb_adamw import SMALLEST_8BIT
from qlora_kit.optim.create import FLAT_NAMES
from qlora_kit.optim.flat import offsets_of
from qlora_kit.plan.gpus import Gpu
from qlora_kit.plan.trace import counted_bytes

BLOCK = 256
"""Elements that share a scale in 8-bit states."""


def kept_in_32_bits(model: nn.Module) -> frozenset[int]:
    """Which parameters have their state in 32 bits whatever the optimizer's name says.

    Args:
        model: that is trained.

    Returns:
        Ids of its embeddings' weights: Transformers asks bitsandbytes for that.

    Example:
        >>> table = nn.Embedding(4, 2)
        >>> kept_in_32_bits(nn.Sequential(table, nn.Linear(2, 2))) == {id(table.weight)}
        True
    """
    return frozenset(id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding))


def optimizer_bytes(
    parameters: Sequence[nn.Parameter], name: str, in_32_bits: Collection[int] = ()
) -> tuple[int, int]:
    """Bytes of AdamW's state.

    Args:
        parameters: trained.
        name: of `FLAT_NAMES`.
        in_32_bits: ids of those whose state has 32 bits under every name.

    Returns:
        gpu: bytes on the GPU.
        host: bytes that can leave it; a paged state counts here and, while there is room, not
        against torch's memory at all.

    Raises:
        ConfigError: the state of this optimizer is not known.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.empty(4096, 16, device="meta"))
        >>> optimizer_bytes([weight], "adamw_torch")[0] // weight.numel()
        8
    """
    if name not in FLAT_NAMES:
        raise ConfigError(f"the state of {name!r} is not known; known: {', '.join(FLAT_NAMES)}.")
    eight = name in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
    sizes: tuple[list[int], list[int]] = ([], [])
    for p in parameters:
        sizes[eight and p.numel() >= SMALLEST_8BIT and id(p) not in in_32_bits].append(p.numel())
    small, large = sizes
    total = 0
    if small:
        total += 2 * counted_bytes(_wide(parameters, name) * offsets_of(small)[-1])
    if large:
        elements = offsets_of(large)[-1]
        total += 2 * (counted_bytes(elements) + counted_bytes(4 * -(-elements // BLOCK)))
    return (0, total) if name.startswith("paged") else (total, 0)


def _wide(parameters: Sequence[nn.Parameter], name: str) -> int:
    """Bytes of one value of a state that is not in 8 bits: torch's is as wide as its parameter."""
    return parameters[0].element_size() if name.startswith("adamw_torch") else 4


def passing_bytes(parameters: Sequence[nn.Parameter], name: str, *, flat: bool) -> int:
    """Bytes that the update itself takes, besides gradients and state.

    Args:
        parameters: trained.
        name: of the optimizer.
        flat: whether one call updates a flat buffer.

    Returns:
        0, but for torch's own AdamW where it is not fused: it has the denominators of all
        parameters at once.

    Example:
        >>> import torch
        >>> weights = [nn.Parameter(torch.empty(1024, device="meta"))]
        >>> [passing_bytes(weights, n, flat=False) for n in ("adamw_torch", "adamw_torch_fused")]
        [4096, 0]
    """
    if flat or name != "adamw_torch":
        return 0
    return sum(counted_bytes(p.numel() * p.element_size()) for p in parameters)


def update_seconds(parameters: Sequence[nn.Parameter], name: str, gpu: Gpu) -> float:
    """Time of clipping and the optimizer's step.

    Args:
        parameters: trained.
        name: of the optimizer.
        gpu: it runs on.

    Returns:
        Seconds: gradients gathered, read for the norm, and read again with values and state.

    Example:
        >>> import torch
        >>> from qlora_kit.plan.gpus import find_gpu
        >>> weight = nn.Parameter(torch.empty(4096, 1 << 14, device="meta"))
        >>> update_seconds([weight], "adamw_torch", find_gpu("h100")) < 1e-2
        True
    """
    values = sum(p.numel() * p.element_size() for p in parameters)
    gpu_bytes, host_bytes = optimizer_bytes(parameters, name)
    return (6 * values + 2 * (gpu_bytes + host_bytes)) / gpu.bandwidth + 4e-4


def importance(modules: Sequence[AdaLoRALinear], gpu: Gpu) -> tuple[int, float]:
    """Memory and time of following how important every value of an AdaLoRA is.

    Args:
        modules: its pieces.
        gpu: it runs on.

    Returns:
        size: bytes of sensitivity and uncertainty, float32 each.
        seconds: of an update, six passes of 64 bytes per value together.

    Example:
        >>> from qlora_kit.adapters.adalora.config import AdaLoRA
        >>> from qlora_kit.plan.gpus import find_gpu
        >>> piece = AdaLoRALinear(nn.Linear(256, 256), "proj", AdaLoRA(rank=4), seed=0)
        >>> importance([piece], find_gpu("h100"))[0]  # of P and Q 4 KiB each, of λ 512 bytes
        17408
    """
    values = [p for module in modules for p in module.trainable().values()]
    size = sum(2 * counted_bytes(4 * p.numel()) for p in values)
    return size, 64 * sum(p.numel() for p in values) / gpu.bandwidth
