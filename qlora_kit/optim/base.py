"""What all flat optimizers share: groups, runs of equal age, state, checkpoints.

A `FlatOptimizer` is a `torch.optim.Optimizer` whose parameter groups hold the model's own
parameters, so that schedules, gradient scalers, accelerate and one's own code see what
they know. Underneath, the parameters of a group lie in one buffer per dtype (`flat.py`),
in `Block`s, and the state of the optimizer in as many buffers of the same layout. A
subclass says which buffers it needs and how one contiguous *run* of them is updated.

A parameter without a gradient is skipped, as torch's optimizers do, and from then on is
younger than its neighbours, which matters to Adam's bias correction. So a block counts
updates per parameter, on the host, and updates runs of parameters of equal age: one run
where nothing was ever skipped, which is the usual case.

`state_dict` gives one entry per parameter in the names of the library whose arithmetic
it is (torch, bitsandbytes): views of the buffers, which that library's own per-tensor
optimizer loads, and the reverse.

Nothing here waits for the GPU. Step numbers and learning rates go to the kernels by
value, so a captured CUDA graph should end before `step`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.core.errors import SourceError
from qlora_kit.optim.clip import clip_gradients, gradient_norm
from qlora_kit.optim.flat import ALIGNMENT, FlatParameters

LONGEST_RUN = 1 << 30
"""Elements updated by one call: bitsandbytes counts them in 32 bits."""

Groups = Sequence[dict[str, Any]] | Sequence[nn.Parameter]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours of equal age, updated by one call."""

    start: int
    """First element."""
    stop: int
    """One after the last, padding included."""
    step: int
    """Number of this update for these parameters, from 1."""


@dataclass(slots=True)
class Block:
    """Parameters of one group, dtype and kind of state, with that state.

    Example:
        >>> block = Block(FlatParameters([nn.Parameter(torch.ones(3)) for _ in range(3)]), 0, 32)
        >>> block.advance(skipped=(1,))
        [Run(start=0, stop=256, step=1), Run(start=512, stop=768, step=1)]
        >>> block.advance(skipped=())[1]
        Run(start=256, stop=512, step=1)
    """

    flat: FlatParameters
    """Values and gradients."""
    group: int
    """Index of the parameter group that has its learning rate."""
    bits: int
    """Of the state: 32 or 8."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Name to buffer: one element per element of the parameters, or one per 256 of them."""
    steps: list[int] = field(default_factory=list)
    """Updates so far of each parameter."""
    whole: list[tuple[int, int]] = field(init=False)
    """Bounds of all of it, in as many parts as calls are needed."""

    def __post_init__(self) -> None:
        """No parameter has been updated yet."""
        count = len(self.flat.parameters)
        self.steps = self.steps or [0] * count
        self.whole = _cut(self.flat.offsets, list(range(count)))

    def advance(self, skipped: tuple[int, ...]) -> list[Run]:
        """Count one update.

        Args:
            skipped: positions of the parameters that take no part.

        Returns:
            What to update, in order; neighbours of equal age together.
        """
        if not skipped and len(set(self.steps)) == 1:
            step = self.steps[0] + 1
            self.steps = [step] * len(self.steps)
            return [Run(start, stop, step) for start, stop in self.whole]
        left_out = set(skipped)
        moving = [i for i in range(len(self.steps)) if i not in left_out]
        for i in moving:
            self.steps[i] += 1
        runs: list[Run] = []
        for (step, _), members in groupby(
            enumerate(moving), key=lambda pair: (self.steps[pair[1]], pair[1] - pair[0])
        ):
            bounds = _cut(self.flat.offsets, [i for _, i in members])
            runs += [Run(start, stop, step) for start, stop in bounds]
        return runs

    def part(self, name: str, position: int) -> Tensor:
        """One parameter's share of a state buffer.

        Args:
            name: of the buffer.
            position: of the parameter.

        Returns:
            A view: in the parameter's shape, or (blocks,) where there is one value per block.
        """
        buffer, parameter = self.state[name], self.flat.parameters[position]
        start = self.flat.offsets[position]
        if buffer.numel() == self.flat.data.numel():
            return buffer[start : start + parameter.numel()].view(parameter.shape)
        blocks = -(-parameter.numel() // ALIGNMENT)
        return buffer[start // ALIGNMENT : start // ALIGNMENT + blocks]

    def padding(self, name: str, position: int) -> Tensor:
        """What lies behind one parameter's share of a state buffer.

        Args:
            name: of the buffer.
            position: of the parameter.

        Returns:
            A view; empty for buffers with one value per block.
        """
        buffer, offsets = self.state[name], self.flat.offsets
        if buffer.numel() != self.flat.data.numel():
            return buffer[:0]
        start = offsets[position] + self.flat.parameters[position].numel()
        return buffer[start : offsets[position + 1]]


def _cut(offsets: Sequence[int], neighbours: list[int]) -> list[tuple[int, int]]:
    """Bounds of neighbouring parameters, in parts no longer than `LONGEST_RUN` if possible."""
    start, bounds = offsets[neighbours[0]], []
    for i in neighbours:
        if offsets[i + 1] - start > LONGEST_RUN and offsets[i] > start:
            bounds.append((start, offsets[i]))
            start = offsets[i]
    return [*bounds, (start, offsets[neighbours[-1] + 1])]


class FlatOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that updates each group in a few kernels, whatever its size.

    Subclasses: `FlatAdamW` (torch's arithmetic), `FlatBnbAdamW` (bitsandbytes').

    Attributes:
        blocks: the buffers behind the parameter groups.
    """

    def __init__(self, params: Groups, defaults: dict[str, Any]) -> None:
        """Move the parameters into flat buffers; subclasses name the defaults.

        Args:
            params: parameters or groups of them, as for any torch optimizer.
            defaults: values of the groups' options.

        Raises:
            AdapterError: the parameters cannot share buffers; see `why_not_flat`.
        """
        self.blocks: list[Block] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, such as `lr`; see torch.

        Args:
            param_group: `params` and options.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        kinds: dict[tuple[torch.dtype, torch.device, int], list[nn.Parameter]] = {}
        for parameter in self.param_groups[index]["params"]:
            kind = (parameter.dtype, parameter.device, self._bits_of(parameter))
            kinds.setdefault(kind, []).append(parameter)
        for (_, _, bits), members in kinds.items():
            self.blocks.append(Block(FlatParameters(members), index, bits))

    # What a subclass defines

    def _bits_of(self, parameter: nn.Parameter) -> int:
        """Bits per value of the state this parameter gets."""
        return 32

    def _make_state(self, block: Block) -> dict[str, Tensor]:
        """Allocate the state buffers of a block, zero."""
        raise NotImplementedError

    def _update(self, block: Block, grad: Tensor, run: Run, group: dict[str, Any]) -> None:
        """Update one run of a block in place: its values and its state."""
        raise NotImplementedError

    def _constants(self, block: Block) -> dict[str, Tensor]:
        """What the library's checkpoints hold besides state: the same for all parameters."""
        return {}

    def _zero_of(self, block: Block, name: str) -> int:
        """How a state of zero is stored in a buffer, between parameters."""
        return 0

    def _wait(self) -> None:
        """Before the host reads or writes state that the GPU may still be writing."""

    # Updates

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the loss again; usually None.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for block in self.blocks:
            block.flat.reclaim()
            grad = block.flat.gather()
            if grad is None:
                continue
            if not block.state:
                block.state = self._make_state(block)
            for run in block.advance(block.flat.missing):
                self._update(block, grad, run, self.param_groups[block.group])
            # The kernels write to the buffer; autograd watches the parameters' own counters.
            torch.autograd.graph.increment_version(block.flat.parameters)
            block.flat.release_grad()
        return loss

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their common norm is at most `max_norm`.

        Call it after the last backward pass and before `step`, once.

        Args:
            max_norm: None measures only.

        Returns:
            () float32, the norm before, on the parameters' device: reading it waits, so
            read it when it is logged.
        """
        flats = [block.flat for block in self.blocks]
        return gradient_norm(flats) if max_norm is None else clip_gradients(flats, max_norm)

    # Checkpoints

    def _places(self) -> Iterator[tuple[nn.Parameter, Block, int]]:
        for block in self.blocks:
            for position, parameter in enumerate(block.flat.parameters):
                yield parameter, block, position

    def state_dict(self) -> dict[str, Any]:
        """Options of the groups, and the state of each parameter under its number.

        Returns:
            As torch's: `state` and `param_groups`. Tensors are views of the live buffers.
        """
        self._wait()
        packed = super().state_dict()
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        number = {id(parameter): i for i, parameter in enumerate(parameters)}
        constants = [self._constants(block) for block in self.blocks]
        for block, shared in zip(self.blocks, constants, strict=True):
            for position, parameter in enumerate(block.flat.parameters):
                if block.steps[position]:
                    entry = {name: block.part(name, position) for name in block.state}
                    packed["state"][number[id(parameter)]] = self._pack(
                        block.steps[position], entry, shared
                    )
        packed["state"] = dict(sorted(packed["state"].items()))
        return packed

    def _pack(self, step: int, entry: dict[str, Tensor], shared: dict[str, Tensor]) -> Any:
        return {"step": torch.tensor(float(step)), **entry, **shared}

    def _unpack(self, entry: dict[str, Any]) -> dict[str, Any]:
        return entry

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a state was saved, here or by the library's per-tensor optimizer.

        Args:
            state_dict: as `state_dict` gives it; tensors on any device.

        Raises:
            SourceError: it is the state of another optimizer or of other parameters.
        """
        self._wait()
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        entries = {
            id(parameter): self._unpack(state_dict["state"][number])
            for number, parameter in zip(saved, own, strict=True)
            if number in state_dict["state"]
        }
        for block in self.blocks:
            if not block.state and any(id(p) in entries for p in block.flat.parameters):
                block.state = self._make_state(block)
        for parameter, block, position in self._places():
            self._restore(block, position, entries.get(id(parameter)))

    def _restore(self, block: Block, position: int, entry: dict[str, Any] | None) -> None:
        """Put one parameter's state back; zero where it had none."""
        if entry is not None:
            self._check_entry(block, position, entry)
        block.steps[position] = 0 if entry is None else int(entry["step"])
        for name in block.state:
            part = block.part(name, position)
            if entry is None:
                part.zero_()
            else:
                part.copy_(entry[name])
                block.padding(name, position).fill_(self._zero_of(block, name))

    def _check_entry(self, block: Block, position: int, entry: dict[str, Any]) -> None:
        needed = {name: tuple(block.part(name, position).shape) for name in block.state}
        found = {key: tuple(v.shape) for key, v in entry.items() if isinstance(v, Tensor)}
        if "step" not in entry or any(found.get(name) != needed[name] for name in needed):
            raise SourceError(
                f"the saved optimizer state does not fit {type(self).__name__}: a parameter of "
                f"shape {tuple(block.flat.parameters[position].shape)} needs {needed}, and the "
                f"checkpoint has {found}. Resume with the optimizer and the adapter it was saved "
                "with."
            )
