"""AdamW with state in 8 bits or in paged memory: bitsandbytes' kernels on flat buffers.

bitsandbytes launches a kernel per tensor and waits for the GPU after each. Here one call
updates all parameters of a group. Its blocks of 256 never span two parameters, since those
start at multiples of 256, and like it we keep the state of parameters below 4,096 elements
(and of embeddings, as Transformers asks it to) in 32 bits: they lie in a second block. So
every parameter gets the bits that `bitsandbytes.optim.AdamW` would give it.

*Paged* state lives in CUDA managed memory, which the driver moves to the host when the GPU
is full and back when a kernel reads it. bitsandbytes pages tensors from 100,000 elements
on; one buffer per state pages whatever the size of what is in it. Each update asks for it
to be moved ahead of the kernel. On a CPU there is nothing to page.

Kernels of bitsandbytes run on CUDA's default stream, whatever torch's current one is, so
another stream and the default one wait for each other, on the device.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.optim.base import Block, FlatOptimizer, Groups, Run
from qlora_kit.optim.flat import ALIGNMENT

SMALLEST_8BIT = 4096
"""Elements from which a parameter's state is kept in 8 bits, as in bitsandbytes."""

_WRAPPED = "__bnb_optimizer_quant_state__"
"""Name under which the entries of bitsandbytes' checkpoints hold their tensors."""


class FlatBnbAdamW(FlatOptimizer):
    """AdamW by bitsandbytes on flat buffers; loads and saves its per-tensor state.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> optimizer = FlatBnbAdamW(layer.parameters(), lr=0.1, bits=8)
        >>> [(block.bits, block.flat.data.numel()) for block in optimizer.blocks]
        [(8, 4096), (32, 256)]
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.blocks[0].state["state1"].dtype
        torch.uint8
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 8,
        paged: bool = False,
        keep_32bit: Iterable[Tensor] = (),
    ) -> None:
        """Move the parameters into flat buffers.

        Args:
            params: parameters or groups of them.
            lr: learning rate.
            betas: of the two averages.
            eps: added to the denominator.
            weight_decay: decoupled.
            bits: 8 or 32, of the state.
            paged: keep the state in memory that can move to the host.
            keep_32bit: parameters whose state stays in 32 bits at any size.

        Raises:
            AdapterError: the parameters cannot share buffers.
        """
        self.bits = bits
        self.is_paged = paged
        self._keep_32bit = {id(parameter) for parameter in keep_32bit}
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _bits_of(self, parameter: nn.Parameter) -> int:
        small = parameter.numel() < SMALLEST_8BIT or id(parameter) in self._keep_32bit
        return 32 if small else self.bits

    def _make_state(self, block: Block) -> dict[str, Tensor]:
        data = block.flat.data
        dtype = torch.uint8 if block.bits == 8 else torch.float32
        count = data.numel()
        state = {name: self._buffer(count, dtype, data.device) for name in ("state1", "state2")}
        if block.bits == 8:
            for name in ("absmax1", "absmax2"):
                state[name] = torch.zeros(count // ALIGNMENT, device=data.device)
        return state

    def _buffer(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self.is_paged or device.type != "cuda":
            return torch.zeros(count, dtype=dtype, device=device)
        return _paged_zeros(count, dtype, device)

    def _code(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Values of the signed and the unsigned 8-bit codes, (256,) float32 each."""
        import bitsandbytes.functional as bnb

        if device not in self._maps:
            signed, unsigned = (bnb.create_dynamic_map(signed=sign) for sign in (True, False))
            self._maps[device] = signed.to(device), unsigned.to(device)
        return self._maps[device]

    def _constants(self, block: Block) -> dict[str, Tensor]:
        if block.bits != 8:
            return {}
        signed, unsigned = self._code(block.flat.data.device)
        return {"qmap1": signed, "qmap2": unsigned}

    def _zero_of(self, block: Block, name: str) -> int:
        if block.bits != 8 or not name.startswith("state"):
            return 0
        code = self._code(block.flat.data.device)[name == "state2"]
        return int((code == 0).nonzero()[0])

    def _update(self, block: Block, grad: Tensor, run: Run, group: dict[str, Any]) -> None:
        import bitsandbytes.functional as bnb

        here = slice(run.start, run.stop)
        values, grad = block.flat.data[here], grad[here]
        first, second = (_part(block.state[name], here) for name in ("state1", "state2"))
        beta1, beta2 = group["betas"]
        with _default_stream(values.device):
            if block.bits == 32:
                bnb.optimizer_update_32bit(
                    "adam",  # with decoupled decay: AdamW
                    grad,
                    values,
                    first,
                    beta1,
                    group["eps"],
                    run.step,
                    float(group["lr"]),
                    second,
                    beta2,
                    weight_decay=group["weight_decay"],
                )
                return
            blocks = slice(run.start // ALIGNMENT, run.stop // ALIGNMENT)
            signed, unsigned = self._code(values.device)
            bnb.optimizer_update_8bit_blockwise(
                "adam",
                grad,
                values,
                first,
                second,
                beta1,
                beta2,
                0.0,  # beta3 and alpha: of AdEMAMix
                0.0,
                group["eps"],
                run.step,
                float(group["lr"]),
                signed,
                unsigned,
                block.state["absmax1"][blocks],
                block.state["absmax2"][blocks],
                weight_decay=group["weight_decay"],
            )

    def _wait(self) -> None:
        device = self.blocks[0].flat.data.device
        if self.is_paged and device.type == "cuda":
            torch.cuda.synchronize(device)  # the host reads managed memory by itself

    def _pack(self, step: int, entry: dict[str, Tensor], shared: dict[str, Tensor]) -> Any:
        return {"step": step, _WRAPPED: entry | shared}

    def _unpack(self, entry: dict[str, Any]) -> dict[str, Any]:
        inner = entry.get(_WRAPPED, {})
        return {key: value for key, value in entry.items() if key != _WRAPPED} | inner


def _paged_zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # needs a GPU
    """Zeros in CUDA managed memory: a CPU tensor to torch, which kernels on `device` read."""
    import bitsandbytes.functional as bnb

    buffer: Tensor = bnb.get_paged(count, dtype=dtype, device=device)
    bnb.fill(buffer, 0)
    return buffer


def _part(state: Tensor, here: slice) -> Tensor:
    """Part of a state buffer, moved to the GPU ahead of the kernel if it is paged."""
    part = state[here]
    if getattr(state, "is_paged", False):  # needs a GPU
        import bitsandbytes.functional as bnb

        # bitsandbytes tells paged tensors by attributes, which a slice does not inherit
        part.is_paged = True  # type: ignore[attr-defined]
        part.page_deviceid = state.page_deviceid  # type: ignore[attr-defined]
        bnb.prefetch_tensor(part)
    return part


@contextmanager
def _default_stream(device: torch.device) -> Iterator[None]:
    """Order what runs inside, on CUDA's default stream, with torch's current stream."""
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if current != default:
        default.wait_stream(current)
    yield
    if current != default:
        current.wait_stream(default)
