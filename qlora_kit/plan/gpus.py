"""GPUs a run can be planned for: their memory, and how fast they do what a step consists of.

Rates are what a step sustains, not what a data sheet promises: under a long load a GPU lowers
its clock to stay within its power. Those of the H100 were fitted to measured steps
(benchmarks/results/plan). The H200 has the same, but for its faster memory: nothing was fitted to
its steps, which they are held to; but attention's rates over long rows are between what was timed
on both (docs/planner.md). For the others the data sheet's figure for dense bfloat16 with
float32 sums is scaled by the same share, and a plan says so.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from qlora_kit.core.errors import ConfigError
from qlora_kit.core.units import GIB
from qlora_kit.plan.host import ASSUMED_US, host_us_per_op
from qlora_kit.step.graph import recorded_tokens

CACHED = 16 << 20
"""Bytes of one head's keys and values up to which attention keeps its rate on a Hopper card."""
SUSTAINED = 0.703
"""Share of the data sheet's matrix rate that the largest products of a step reach, on an H100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """FLOP/s of one pass of causal attention: rows have to be long, and heads wide."""

    peak: float
    """Over rows without end."""
    half: float
    """Tokens of a row at which half of the peak is reached."""
    loss: float = 0.0
    """Share lost with every doubling of a head's keys and values beyond `CACHED`."""

    def rate(self, tokens: int, head_dim: int = 128) -> float:
        """FLOP/s over rows of so many tokens.

        Args:
            tokens: of a row, at least one.
            head_dim: of a head; narrow ones leave more to the softmax.

        Returns:
            FLOP/s, counting what causality leaves of the products.

        Example:
            >>> Attention(peak=6e14, half=1000).rate(1000)
            300000000000000.0
            >>> Attention(peak=6e14, half=0, loss=0.1).rate(1 << 16) / 6e14  # 32 MiB, twice CACHED
            0.9
        """
        rate = self.peak / (1 + self.half / tokens) / max(1.0, 0.5 + 64 / head_dim)
        doublings = max(0.0, math.log2(4 * tokens * head_dim / CACHED))
        return rate * max(0.5, 1.0 - self.loss * doublings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """As `--gpu` takes it."""
    capability: tuple[int, int]
    """Compute capability."""
    memory_bytes: int
    """What torch can have of it, error correction on."""
    matrix_flops: float
    """Sustained FLOP/s of large 16-bit products."""
    bandwidth: float
    """Bytes/s of kernels that read and write each value once."""
    link: float
    """Bytes/s from pinned host memory."""
    forward: Attention
    backward: Attention
    host_us: float = ASSUMED_US
    """Of the machine it is in: microseconds per small op, as `host.py` measures them."""
    host_measured: bool = False
    """Whether that was measured."""
    measured: bool = False
    """Whether steps measured on this card were within 15% of what its rates say."""

    @property
    def uses_cudnn_attention(self) -> bool:
        """Whether attention goes to cuDNN first, as `ops/attention/choose.py` has it."""
        return self.capability[0] in (9, 10)


def _estimated(
    name: str,
    capability: tuple[int, int],
    memory_gib: float,
    tflops: float,
    terabytes: float,
    link: float = 25e9,
) -> Gpu:
    """From a data sheet: TFLOP/s of dense bfloat16 with float32 sums, TB/s of memory."""
    matrix = SUSTAINED * tflops * 1e12
    return Gpu(
        name=name,
        capability=capability,
        memory_bytes=int(memory_gib * GIB),
        matrix_flops=matrix,
        bandwidth=0.85 * terabytes * 1e12,
        link=link,
        forward=Attention(peak=0.85 * matrix, half=500),
        backward=Attention(peak=0.7 * matrix, half=800),
    )


_HOPPER = {
    "capability": (9, 0),
    "matrix_flops": SUSTAINED * 989e12,
    "link": 54e9,
    "forward": Attention(peak=690e12, half=560, loss=0.075),
    "backward": Attention(peak=610e12, half=1300, loss=0.045),
    "measured": True,
}

GPUS: tuple[Gpu, ...] = (
    Gpu(name="h100", memory_bytes=int(79.1 * GIB), bandwidth=2.85e12, **_HOPPER),  # type: ignore[arg-type]
    Gpu(name="h200", memory_bytes=int(139.8 * GIB), bandwidth=4.1e12, **_HOPPER),  # type: ignore[arg-type]
    _estimated("b200", (10, 0), 178.0, 2250, 8.0, 54e9),
    _estimated("a100-80gb", (8, 0), 79.1, 312, 2.0),
    _estimated("a100-40gb", (8, 0), 39.4, 312, 1.55),
    _estimated("l40s", (8, 9), 44.4, 362, 0.864),
    _estimated("rtx-6000-ada", (8, 9), 47.4, 364, 0.96),
    _estimated("rtx-a6000", (8, 6), 47.4, 155, 0.768),
    _estimated("a40", (8, 6), 44.3, 150, 0.696),
    _estimated("rtx-5090", (12, 0), 31.3, 210, 1.79, 50e9),
    _estimated("rtx-4090", (8, 9), 23.5, 165, 1.01),
    _estimated("rtx-3090", (8, 6), 23.6, 71, 0.936),
    _estimated("a10", (8, 6), 22.0, 125, 0.6),
    _estimated("l4", (8, 9), 22.0, 121, 0.3),
)
"""Kinds that are known. Memory is what torch reports, not what the box says."""

DEFAULT = "l40s"
"""The 48 GB card that a plan without a GPU is made for."""

_MARKS = {
    "6000 ada": "rtx-6000-ada",
    "a6000": "rtx-a6000",
    "a10g": "a10",
    "5090": "rtx-5090",
    "4090": "rtx-4090",
    "3090": "rtx-3090",
} | {name: name for name in ("h100", "h200", "b200", "l40s", "a40", "a10", "l4")}
"""Words of a device's name to the kind it is."""


def find_gpu(name: str) -> Gpu:
    """A known kind of GPU by its name.

    Args:
        name: of `GPUS`.

    Returns:
        The kind.

    Raises:
        ConfigError: it is not known.

    Example:
        >>> find_gpu("l40s").capability
        (8, 9)
    """
    for gpu in GPUS:
        if gpu.name == name:
            return gpu
    raise ConfigError(f"unknown GPU {name!r}; known: {', '.join(gpu.name for gpu in GPUS)}.")


def this_gpu() -> Gpu | None:
    """The kind of this machine's first GPU, with its own memory.

    Returns:
        The kind; an unknown one is taken for the known kind whose memory is nearest. None
        without a GPU.
    """
    return _ask_device() if torch.cuda.is_available() else None


def this_machine() -> Gpu | None:
    """This machine's first GPU, and how fast its host is, measured once in a process.

    Returns:
        As `this_gpu`; None without a GPU.
    """
    gpu = this_gpu()
    return None if gpu is None else replace(gpu, host_us=_host_us(), host_measured=True)


@cache
def _host_us() -> float:  # needs a GPU
    return host_us_per_op("cuda")


def recorded_here(model: nn.Module) -> int:
    """Up to how many tokens a batch of a model is recorded on this machine's GPU.

    Args:
        model: with decoder layers, on any device.

    Returns:
        Tokens; without a GPU those of an H100.

    Example:
        >>> recorded_here(nn.Linear(1, 1))
        16384
    """
    return recorded_tokens(model, (this_gpu() or find_gpu("h100")).matrix_flops)


def _ask_device() -> Gpu:  # needs a GPU
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return replace(recognise(properties.name, properties.total_memory), name=properties.name)


def recognise(name: str, memory_bytes: int) -> Gpu:
    """The kind that a device's own name belongs to, with its memory.

    Args:
        name: as the driver gives it.
        memory_bytes: of the device.

    Returns:
        A known kind, its memory replaced.

    Example:
        >>> recognise("NVIDIA H100 80GB HBM3", 80 << 30).name
        'h100'
        >>> recognise("NVIDIA Something New", 24 << 30).name
        'rtx-3090'
    """
    words = f" {name.lower().replace('-', ' ')} "
    if " a100 " in words:
        kind = "a100-80gb" if memory_bytes > 50 * GIB else "a100-40gb"
    else:
        nearest = min(GPUS, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))
        found = (known for mark, known in _MARKS.items() if f" {mark} " in words)
        kind = next(found, nearest.name)
    return replace(find_gpu(kind), memory_bytes=memory_bytes)
