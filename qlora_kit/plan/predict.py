"""Peak memory and time of one training step, predicted from a model's configuration.

The step that `train` runs is run on the meta device, by the same code, under a trace. What
is there before it (weights, adapters, optimizer state) is counted from the outline's
parameters; what the step allocates, from the trace at the moment of its peak.

Time is the sum of what the ops cost by themselves. It is not less than the host needs to
launch them, nor than the bytes that go to the host and back.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from qlora_kit.adapters.adalora.layer import add_orthogonality
from qlora_kit.block.offload import OutlinedStore
from qlora_kit.core.units import GIB
from qlora_kit.ops.attention.transformers_door import unpadded_inputs
from qlora_kit.plan.gpus import Gpu
from qlora_kit.plan.outline import Outline, components, outline
from qlora_kit.plan.setup import FULL, PREFIX, Setup
from qlora_kit.plan.state import (
    importance,
    kept_in_32_bits,
    optimizer_bytes,
    passing_bytes,
    update_seconds,
)
from qlora_kit.plan.trace import BACKWARD, Block, Trace, counted_bytes
from qlora_kit.step.graph import recorded_tokens
from qlora_kit.step.head_input import TARGET_POSITIONS, head_input

LIBRARIES = 72 << 20
"""Bytes of cuBLAS's workspaces on Hopper, which torch allocates."""
RECORDING = 32 << 20
"""Bytes of each of two more for the stream that a CUDA graph is recorded on: the forward's, and
that of autograd's thread, which comes with the recording's backward."""
LIBRARIES_BEFORE = 8 << 20
"""On GPUs before Hopper."""
CONTEXT = 520 << 20
"""Bytes of the CUDA context and kernels' code, outside of what torch counts."""
PINNING_S = 0.25
"""Seconds for a GiB of host memory that is pinned, which no kernel hides: half of what torch's own
way took in long rows, as it was beside that on a busy host. An estimate."""
_PINNED = "checkpoints"
_OPERANDS = "adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a step takes."""

    setup: Setup
    gpu: str
    components: dict[str, int]
    """Bytes at the moment of the peak, by name; their sum is the peak."""
    host: dict[str, int]
    """Bytes of pinned host memory, by name."""
    seconds: dict[str, float]
    """On the GPU, by kind of work."""
    step_s: float
    """A whole update."""
    limited_by: str
    """`compute`, `host` (launching kernels) or `link` (copies to host memory)."""
    host_us: float
    """Of the host: microseconds per small op; see `host.py`."""
    fused: bool
    """Whether layers run as one step each."""
    recorded: bool
    """Whether the step becomes a CUDA graph."""
    trained: int
    """Parameters."""
    moved_bytes: int = 0
    """To the host and back, in an update."""
    outside: int = CONTEXT
    """Bytes that torch does not count."""
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say."""
        return sum(self.components.values())

    @property
    def reserved_bytes(self) -> int:
        """What torch will have taken from the driver, fragments included: an estimate."""
        moving = sum(self.components.get(name, 0) for name in MOVING)
        share = FRAGMENTS if self.setup.growing_segments else FIXED_FRAGMENTS
        return self.peak_bytes + int(share * moving)

    @property
    def pinning_s(self) -> float:
        """What the first step takes besides: host memory is pinned once."""
        return PINNING_S * self.host.get(_PINNED, 0) / GIB

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all forward passes of an update, per second."""
        return self.setup.tokens * self.setup.accumulation / self.step_s


FRAGMENTS = 0.06
"""Share of what comes and goes in a step that the allocator holds besides: at most 4.0% in
benchmarks/results/context, where segments grow."""
FIXED_FRAGMENTS = 0.25
"""The same with torch's allocator as it comes: the most that lay idle in the 24 runs of
benchmarks/results/plan_edge that ran out of memory."""
MOVING = ("saved activations", "working set", "decoded weights", "loss chunk", "kernel workspace")
"""Components that come and go with every step."""


def predict(config: PreTrainedConfig, setup: Setup, gpu: Gpu) -> Prediction:
    """Predict memory and time of a training step.

    Args:
        config: of a causal language model.
        setup: of the run.
        gpu: it would run on.

    Returns:
        The prediction.

    Raises:
        ConfigError: the configuration or the policy does not fit.

    Example:
        >>> from transformers import LlamaConfig
        >>> from qlora_kit.plan.gpus import find_gpu
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        >>> predict(config, Setup(rank=8, seq=128), find_gpu("h100")).trained
        7168
    """
    made = outline(config, setup)
    trace = run_step(made, setup, gpu)
    found = components(made)
    trained = made.trained
    state, on_host = optimizer_bytes(trained, setup.optimizer, kept_in_32_bits(made.model))
    found["optimizer"] = state
    found["importance scores"], _ = importance(made.adalora, gpu)
    hopper = gpu.capability[0] == 9
    found["libraries"] = LIBRARIES if hopper else LIBRARIES_BEFORE
    recording = _recording(made, setup, gpu)
    found["libraries"] += recording
    moment, blocks, workspace = trace.peak()
    gradients = {id(b) for p in trained if p.grad is not None and (b := trace.block_of(p.grad))}
    flat = setup.method != FULL
    update = _update_bytes(trained, flat=flat)
    rest = sum(b.size for b in trace.blocks if b.died is None and id(b) not in gradients)
    rest += passing_bytes(trained, setup.optimizer, flat=flat)
    if update + rest + recording > moment:  # the optimizer's step is the peak
        found["libraries"] += recording
        found["gradients"] = update
        found["working set"] = rest
    else:
        _sort(found, blocks, gradients)
        if setup.accumulation > 1:  # all of the passes before are there
            found["gradients"] = update // (1 if setup.method == FULL else 2)
        if workspace:
            found["kernel workspace"] = workspace
    store = made.blocks.host if made.blocks is not None else None
    host = {_PINNED: store.host_bytes} if isinstance(store, OutlinedStore) else {}
    if on_host:
        host["optimizer"] = on_host
    if setup.embeddings_on_host:
        table = made.model.get_input_embeddings().weight
        host["embeddings"] = table.numel() * table.element_size()
    return _timed(made, setup, gpu, trace, found, host)


def _timed(
    made: Outline,
    setup: Setup,
    gpu: Gpu,
    trace: Trace,
    found: dict[str, int],
    host: dict[str, int],
) -> Prediction:
    """The prediction, with its time."""
    seconds = {kind: s * setup.accumulation for kind, s in trace.seconds.items()}
    seconds["optimizer"] = update_seconds(made.trained, setup.optimizer, gpu)
    seconds["optimizer"] += importance(made.adalora, gpu)[1]
    compute = sum(seconds.values())
    graph = is_recorded(made, setup, gpu)
    launching = 0.0 if graph else trace.launching * setup.accumulation
    store = made.blocks.host if made.blocks is not None else None
    moved = store.moved_bytes if isinstance(store, OutlinedStore) else 0
    moved *= setup.accumulation
    limits: dict[str, float] = {"compute": compute, "host": launching, "link": moved / gpu.link}
    limit = max(limits, key=lambda name: limits[name])
    return Prediction(
        setup=setup,
        gpu=gpu.name,
        components={name: size for name, size in found.items() if size},
        host={name: size for name, size in host.items() if size},
        seconds=seconds,
        step_s=limits[limit],
        limited_by=limit,
        host_us=gpu.host_us,
        fused=made.blocks is not None,
        recorded=graph,
        moved_bytes=moved,
        trained=sum(p.numel() for p in made.trained),
    )


def is_recorded(made: Outline, setup: Setup, gpu: Gpu) -> bool:
    """Whether a step becomes a CUDA graph, by the rule that training follows.

    Args:
        made: an outline.
        setup: of the run.
        gpu: it would run on.

    Returns:
        False for batches that keep the GPU busy by themselves, which need none.

    Example:
        >>> from transformers import LlamaConfig
        >>> from qlora_kit.plan.gpus import find_gpu
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> made = outline(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes), Setup())
        >>> [is_recorded(made, Setup(seq=n), find_gpu("h100")) for n in (1 << 14, 1 << 15)]
        [True, False]
    """
    if not setup.graph or made.blocks is None:
        return False
    return setup.tokens <= recorded_tokens(made.model, gpu.matrix_flops)


def _recording(made: Outline, setup: Setup, gpu: Gpu) -> int:
    """Bytes that each pass of a recorded step has for cuBLAS; 0 where none is recorded."""
    if not is_recorded(made, setup, gpu):
        return 0
    return RECORDING if gpu.capability[0] == 9 else LIBRARIES_BEFORE // 2


def run_step(made: Outline, setup: Setup, gpu: Gpu) -> Trace:
    """Run forward and backward under a trace; gradients stay on the parameters.

    Args:
        made: an outline.
        setup: batch and sequence.
        gpu: it would run on.

    Returns:
        The trace.
    """
    model = made.model
    owned = [*model.parameters(), *model.buffers(), *made.kept]
    shape = (setup.batch, setup.seq)
    trace = Trace(gpu, owned)
    targets = max(1, int(setup.tokens * setup.target_share))
    with trace:
        with made.own_code, trace.during("inputs"):
            ids = torch.empty(shape, dtype=torch.int64, device="meta")
            labels = torch.empty(shape, dtype=torch.int64, device="meta")
            positions = torch.empty(targets, dtype=torch.int64, device="meta")
            items = torch.empty((), device="meta")
            inputs: dict[str, Any] = {"input_ids": ids, "labels": labels, "use_cache": False}
            inputs |= {TARGET_POSITIONS: positions}
            if setup.method == PREFIX:  # its masks are made from the collator's
                inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64, device="meta")
            else:
                inputs |= unpadded_inputs()
            with trace.during("forward"):
                selected = head_input(model, inputs)
            assert selected is not None, "every causal model has a head that can be reached"
            with trace.during("loss"):
                loss = selected.losses().total / items
                del selected
        with trace.during(BACKWARD):
            with trace.during("libraries"):
                size = _recording(made, setup, gpu)
                workspace = torch.empty(size, dtype=torch.uint8, device="meta")
            loss.backward()
            del loss, workspace
            if made.adalora:
                add_orthogonality(made.adalora, 1.0)
    return trace


def _sort(found: dict[str, int], blocks: list[Block], gradients: set[int]) -> None:
    """Add the blocks alive at the peak to their components."""
    names = {"forward": "saved activations", "inputs": "working set"}
    names |= {"loss": "loss chunk", "libraries": "libraries"}
    last_forward = max((b.born for b in blocks if b.phase == "forward"), default=0)
    in_forward = all(b.phase in ("inputs", "forward") for b in blocks)
    for block in blocks:
        name = names.get(block.phase, "working set")
        if id(block) in gradients:
            name = "gradients"
        elif block.died is None:
            name = _OPERANDS
        elif block.decoded:
            name = "decoded weights"
        elif in_forward and block.died is not None and block.died - last_forward < _SOON:
            name = "working set"
        found[name] = found.get(name, 0) + block.size


_SOON = 64
"""Changes within which a forward pass drops what it does not keep."""


def _update_bytes(trained: list[nn.Parameter], *, flat: bool) -> int:
    """Gradients when the optimizer steps: as they came, and those of an adapter in one buffer."""
    size = sum(counted_bytes(p.numel() * p.element_size()) for p in trained)
    return 2 * size if flat else size
