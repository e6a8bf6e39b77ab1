"""Which checkpoints count, which go, and what a resume has to put back."""

from pathlib import Path
from typing import Any

import torch

from qlora_kit.train.checkpoints import prune_checkpoints, repage_state


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir()


def left(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """By number, not by name; strangers are left alone."""
    folders(tmp_path, *(f"checkpoint-{n}" for n in (2, 10, 9, 100)), "notes", "checkpoint-x")
    prune_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert left(tmp_path) == {"checkpoint-2", "checkpoint-100", "notes", "checkpoint-x"}
    folders(tmp_path, "checkpoint-99")
    prune_checkpoints(tmp_path, 2, None)
    assert left(tmp_path) == {"checkpoint-99", "checkpoint-100", "notes", "checkpoint-x"}
    prune_checkpoints(tmp_path, None, None)
    assert "checkpoint-99" in left(tmp_path)


def test_leftovers_of_a_killed_run_go(tmp_path: Path) -> None:
    """Half-written folders never count as one of those kept."""
    folders(tmp_path, "checkpoint-1", "checkpoint-2", "checkpoint-3.partial-12")
    prune_checkpoints(tmp_path, 2, None)
    assert left(tmp_path) == {"checkpoint-1", "checkpoint-2"}


class _Paged:
    """Behaves like a paged optimizer of bitsandbytes after `load_state_dict`."""

    is_paged = True

    def __init__(self) -> None:
        big, small = torch.nn.Parameter(torch.ones(200_000)), torch.nn.Parameter(torch.ones(10))
        self.state: dict[Any, dict[str, Any]] = {
            p: {"step": 3, "state1": torch.rand(p.shape), "state2": torch.rand(p.shape)}
            for p in (big, small)
        }

    def get_state_buffer(self, parameter: Any, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.zeros(parameter.shape, dtype=dtype)
        if parameter.numel() >= 1e5:
            buffer.is_paged = True  # type: ignore[attr-defined]
        return buffer


def test_paged_state_is_paged_again() -> None:
    """Same values, large tensors in paged buffers, small ones untouched, once is enough."""
    optimizer = _Paged()
    before = [dict(state) for state in optimizer.state.values()]
    assert repage_state(optimizer) == 2
    for state, old in zip(optimizer.state.values(), before, strict=True):
        for name in ("state1", "state2"):
            assert torch.equal(state[name], old[name])
    big, small = optimizer.state.values()
    assert big["state1"].is_paged
    assert not hasattr(small["state1"], "is_paged")
    assert repage_state(optimizer) == 0
