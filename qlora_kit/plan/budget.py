"""When a run fits: what is predicted, with a margin, against what the process may take.

Weights, adapters and optimizer state are counted exactly. What a step takes besides may be
predicted a little low, and what torch holds beyond what it counts is an estimate. So a run is
said to fit only if all that torch will have reserved fits beside the CUDA context, with 4% of
what comes and goes in a step and 128 MiB to spare. A step that becomes a CUDA graph has memory
of its own; where batches differ in shape, those that are not recorded need theirs beside it. (A
recorded step holds 0.4 to 1.1 GiB more than it would otherwise, in the records of `bench memory`,
and 0.1 to 0.3 where segments grow. That is not counted: one that has no room for it, or leaves too
little beside it, runs as it is, see `step/graph.py`.)
"""

from dataclasses import dataclass

from qlora_kit.core.errors import ConfigError
from qlora_kit.core.units import parse_bytes
from qlora_kit.plan.gpus import Gpu
from qlora_kit.plan.predict import CONTEXT, MOVING, Prediction

MARGIN = 0.04
"""Of what a step takes for itself, the share that has to stay free besides."""
SPARE = 128 << 20
"""Bytes that have to stay free in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a process may take.

    Example:
        >>> Budget.of("44GiB").gpu_bytes >> 30
        44
    """

    gpu_bytes: int
    """Of the GPU, the CUDA context included."""
    host_bytes: int | None = None
    """Of pinned host memory; None if that is not known."""

    @classmethod
    def of(cls, text: str | int, gpu: Gpu | None = None, host: str | int | None = None) -> "Budget":
        """Read a budget.

        Args:
            text: a size, or `auto` for all of the GPU's memory.
            gpu: whose memory `auto` is.
            host: a size, or None.

        Returns:
            The budget.

        Raises:
            ConfigError: it is no size, or less than the CUDA context takes.
        """
        if text == "auto":
            assert gpu is not None, "auto is the memory of some GPU"
            size = gpu.memory_bytes
        else:
            size = parse_bytes(text)
        if size <= CONTEXT:
            raise ConfigError(
                f"a budget of {text!r} does not hold the CUDA context, about "
                f"{CONTEXT >> 20} MiB. Write a size such as 44GiB, or auto for the whole GPU."
            )
        return cls(gpu_bytes=size, host_bytes=None if host is None else parse_bytes(host))

    def room(self, prediction: Prediction) -> int:
        """What a run leaves free.

        Args:
            prediction: of the run.

        Returns:
            Bytes; negative if it does not fit.
        """
        left = self.gpu_bytes - needed_bytes(prediction)
        if self.host_bytes is not None:
            left = min(left, self.host_bytes - sum(prediction.host.values()))
        return left

    def fits(self, prediction: Prediction) -> bool:
        """Whether a run fits, the margin included.

        Args:
            prediction: of the run.

        Returns:
            True only if it does.
        """
        return self.room(prediction) >= 0


def graph_bytes(prediction: Prediction) -> int:
    """Memory that steps recorded as CUDA graphs hold beside what other batches need.

    Args:
        prediction: of the run.

    Returns:
        Bytes; 0 where no step is recorded, or all are alike.
    """
    beside = prediction.setup.varied and prediction.recorded
    return step_bytes(prediction) if beside else 0


def step_bytes(prediction: Prediction) -> int:
    """Memory that comes and goes with every step.

    Args:
        prediction: of the run.

    Returns:
        Bytes, of its peak.
    """
    return sum(prediction.components.get(name, 0) for name in MOVING)


def margin_bytes(prediction: Prediction) -> int:
    """What has to stay free for a run to be sure to fit.

    Args:
        prediction: of the run.

    Returns:
        Bytes.
    """
    return int(MARGIN * step_bytes(prediction)) + SPARE


def needed_bytes(prediction: Prediction) -> int:
    """What has to be free for a run to be sure to fit.

    Args:
        prediction: of the run.

    Returns:
        Bytes of the GPU: reserved memory with a margin, graphs, and the CUDA context.
    """
    held = prediction.reserved_bytes + graph_bytes(prediction)
    return held + margin_bytes(prediction) + prediction.outside
