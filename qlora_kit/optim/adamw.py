"""AdamW with state in the parameters' dtype: torch's arithmetic on flat buffers.

On a GPU torch's fused kernel runs once per group; on a CPU the plain one, or the fused
one by choice. Element by element it computes what `torch.optim.AdamW` computes, so the
bits are the same (tests/optim/test_adamw.py says for which kernels and sizes).

Truth: `torch.optim.AdamW`. Source: arXiv:1711.05101.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from qlora_kit.optim.base import Block, FlatOptimizer, Groups, Run

CPU_CHUNK = 1 << 18
"""Elements updated at a time by the plain kernel, which passes over them a dozen times: they
stay in the processor's cache, four times faster than the whole buffer at once."""


class FlatAdamW(FlatOptimizer):
    """AdamW on flat buffers; loads and saves the state of `torch.optim.AdamW`.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(4, 2)
        >>> optimizer = FlatAdamW(layer.parameters(), lr=0.1)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> _ = optimizer.clip_grad_norm(1.0)
        >>> optimizer.step()
        >>> sorted(optimizer.state_dict()["state"][0])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fused: bool | None = None,
    ) -> None:
        """Move the parameters into flat buffers.

        Args:
            params: parameters or groups of them.
            lr: learning rate.
            betas: of the two averages.
            eps: added to the denominator.
            weight_decay: decoupled.
            fused: torch's fused kernel; None: on a GPU.

        Raises:
            AdapterError: the parameters cannot share buffers.
        """
        self.fused = fused
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _make_state(self, block: Block) -> dict[str, Tensor]:
        data = block.flat.data
        return {"exp_avg": torch.zeros_like(data), "exp_avg_sq": torch.zeros_like(data)}

    def _update(self, block: Block, grad: Tensor, run: Run, group: dict[str, Any]) -> None:
        device = block.flat.data.device
        fused = device.type == "cuda" if self.fused is None else self.fused
        buffers = (block.flat.data, grad, block.state["exp_avg"], block.state["exp_avg_sq"])
        chunk = CPU_CHUNK if device.type == "cpu" and not fused else run.stop - run.start
        beta1, beta2 = group["betas"]
        for start in range(run.start, run.stop, chunk):
            values, gradient, average, square = (
                [buffer[start : min(start + chunk, run.stop)]] for buffer in buffers
            )
            # Counts itself up. A fill, not a copy from the host, which would wait for the GPU.
            step = torch.full((), run.step - 1.0, dtype=torch.float32, device=device)
            adamw(
                values,
                gradient,
                average,
                square,
                [],
                [step],
                foreach=False,
                fused=fused,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
