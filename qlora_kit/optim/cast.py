"""The trained tensors in the compute dtype, rounded by one kernel per forward pass.

Masters are float32, products run in bfloat16. Casting where the product is costs a kernel
per tensor and per use, hundreds in a step; casting the whole buffer costs one.

*When is a copy out of date?* Torch counts in-place changes, but `p.data.copy_(...)`, which
averaging and swapping of weights use, is seen by no counter: `.data` has one of its own.
Any rule that notices it has to read the values, and reading the values is what the cast
costs (0.25 GB of traffic for 42 million values: a tenth of a millisecond on an H100). So
the rule is: `refresh` before every forward pass of the model, always. Then whatever has
changed the values, an optimizer, a checkpoint, a user, is in the copy. Within one forward
and its backward nothing may change them anyway.

The copy follows the parameters wherever they are. Where they lie in one flat buffer
(`flat.py`), in the same order, it is one kernel; anywhere else one `_foreach_copy_`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qlora_kit.optim.flat import offsets_of, views_of

_MOST_RUNS = 4
"""Contiguous parts up to which copying part by part beats a call over all tensors."""


class CastCopy:
    """Parameters rounded to another dtype, at addresses that stay.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 2))
        >>> low = CastCopy([weight], torch.bfloat16)
        >>> weight.data.add_(1)  # seen by no version counter
        tensor([[2., 2.],
                [2., 2.]])
        >>> low.refresh()
        >>> low[weight]
        tensor([[2., 2.],
                [2., 2.]], dtype=torch.bfloat16)
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        """Allocate the copy, in the order in which the parameters lie now, and fill it.

        Args:
            parameters: on one device. Make the optimizer first, which moves them.
            dtype: of the copy.
        """
        self.parameters = tuple(sorted(parameters, key=lambda p: p.data_ptr()))
        self._offsets = offsets_of(p.numel() for p in self.parameters)
        self._shapes = [p.shape for p in self.parameters]
        device = self.parameters[0].device if self.parameters else None
        self.data = torch.zeros(self._offsets[-1], dtype=dtype, device=device)
        self._views = views_of(self.data, self._shapes, self._offsets)
        self._by_id = {id(p): view for p, view in zip(self.parameters, self._views, strict=True)}
        self._addresses: list[int] = []
        self._runs: list[tuple[Tensor, Tensor]] = []
        self.refresh()

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        """One parameter's copy: the same tensor every time, without a gradient."""
        return self._by_id[id(parameter)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round all values as they are now."""
        addresses = [p.data_ptr() for p in self.parameters]
        if addresses != self._addresses:
            self._runs = self._find_runs()
            self._addresses = addresses
        if self._runs:
            for source, target in self._runs:
                target.copy_(source)
        elif self.parameters:
            torch._foreach_copy_(self._views, [p.detach() for p in self.parameters])

    def refresh_before(self, module: nn.Module) -> RemovableHandle:
        """Refresh before every forward pass of a module.

        Args:
            module: the model.

        Returns:
            Ends it.
        """

        def hook(module: nn.Module, inputs: Any) -> None:
            self.refresh()

        return module.register_forward_pre_hook(hook)

    def _find_runs(self) -> list[tuple[Tensor, Tensor]]:
        """Parts of the source that lie as in the copy; empty if they are too many."""
        runs: list[tuple[Tensor, Tensor]] = []
        start = 0
        for i in range(1, len(self.parameters) + 1):
            if i < len(self.parameters) and self._follows(i):
                continue
            runs.append(self._run(start, i - 1))
            start = i
        return runs if len(runs) <= _MOST_RUNS else []

    def _follows(self, i: int) -> bool:
        """Whether parameter i lies behind the one before at the distance the copy has."""
        before, after = self.parameters[i - 1], self.parameters[i]
        return (
            before.dtype == after.dtype
            and before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
            and after.storage_offset() - before.storage_offset()
            == self._offsets[i] - self._offsets[i - 1]
            and before.is_contiguous()
            and after.is_contiguous()
        )

    def _run(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        begin, parameter = self.parameters[first], self.parameters[last]
        start, stop = self._offsets[first], self._offsets[last] + parameter.numel()
        if first == last:
            return parameter.detach(), self._views[first]
        source = begin.detach().as_strided((stop - start,), (1,), begin.storage_offset())
        return source, self.data[start:stop]
