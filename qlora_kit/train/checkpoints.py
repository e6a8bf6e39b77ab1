"""Which checkpoint folders are whole.

A checkpoint is written beside its final name and renamed when complete, so a
killed run leaves `checkpoint-30.partial-...`, which nothing here looks at. What
another program, a full disk or an interrupted copy left half-written is told by
its content: every part present, every archive closed.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.core.errors import SourceError
from qlora_kit.core.log import logger

STATE_FILE = "trainer_state.json"
ADAPTER_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_problem(folder: Path) -> str | None:
    """Say what a checkpoint folder lacks.

    Args:
        folder: a folder named `checkpoint-<updates>`.

    Returns:
        None if it is whole, otherwise what is missing or broken.

    Example:
        >>> import tempfile
        >>> checkpoint_problem(Path(tempfile.mkdtemp()))
        'no trainer_state.json'
    """
    for name in (STATE_FILE, ADAPTER_FILE, OPTIMIZER_FILE, SCHEDULER_FILE):
        if not (folder / name).is_file():
            return f"no {name}"
    if not any(folder.glob("rng_state*.pth")):
        return "no rng_state.pth"
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return f"{STATE_FILE} is not JSON"
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt"):
            pass
    except SafetensorError as error:
        return f"{ADAPTER_FILE}: {error}"
    for archive in (folder / OPTIMIZER_FILE, folder / SCHEDULER_FILE, *folder.glob("*.pth")):
        if not zipfile.is_zipfile(archive):
            return f"{archive.name} is cut off"
    return None


def whole_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that can be resumed from, oldest first.

    Args:
        folder: where a run keeps its checkpoints; may be missing.

    Returns:
        Whole checkpoint folders by number of updates; broken ones are logged.

    Example:
        >>> whole_checkpoints(Path("nowhere"))
        []
    """
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        problem = checkpoint_problem(path)
        if problem is None:
            found.append((int(match[1]), path))
        else:
            logger.warning("ignoring the incomplete checkpoint %s: %s", path, problem)
    return [path for _, path in sorted(found)]


def last_checkpoint(folder: Path) -> Path:
    """Find the newest checkpoint that is whole.

    Args:
        folder: where a run keeps its checkpoints.

    Returns:
        The folder to resume from.

    Raises:
        SourceError: there is none.

    Example:
        >>> last_checkpoint(Path("nowhere"))
        Traceback (most recent call last):
        ...
        qlora_kit.core.errors.SourceError: nothing to resume: no whole checkpoint in nowhere...
    """
    found = whole_checkpoints(folder)
    if not found:
        raise SourceError(
            f"nothing to resume: no whole checkpoint in {folder}. Start without resume, or name "
            "the output folder of the interrupted run."
        )
    return found[-1]


def prune_checkpoints(folder: Path, keep: int | None, best: str | None) -> None:
    """Remove old checkpoints, and what a killed run left half-written.

    Args:
        folder: where a run keeps its checkpoints.
        keep: how many to keep, the newest and the best always among them; None keeps all.
        best: folder of the best checkpoint, if one is known.

    Example:
        >>> prune_checkpoints(Path("nowhere"), 2, None)
    """
    if not folder.is_dir():
        return
    for path in folder.glob("checkpoint-*.partial-*"):
        shutil.rmtree(path, ignore_errors=True)
    if keep is None or keep < 1:
        return
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    paths = [path for _, path in sorted(numbered)]
    kept = {paths[-1]} if paths else set()
    if best is not None:
        kept.add(Path(best))
    for path in reversed(paths):
        if len(kept) >= keep:
            break
        kept.add(path)
    for path in paths:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def restore_adapter(adapter: AttachedAdapter, folder: Path) -> None:
    """Copy the values saved in a checkpoint into an attached adapter.

    Args:
        adapter: attached with the configuration it was saved from.
        folder: the checkpoint.

    Raises:
        AdapterError: the checkpoint belongs to another configuration.

    Example:
        >>> import tempfile, torch
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> from qlora_kit.adapters.inject import attach
        >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(8, 4)])})
        >>> adapter = attach(model, LoRA(rank=2))
        >>> folder = Path(tempfile.mkdtemp()) / "checkpoint-1"
        >>> adapter.save(folder)
        >>> restore_adapter(adapter, folder)
    """
    adapter.load_files(read_adapter(folder))


def repage_state(optimizer: Any) -> int:
    """Put the restored state of a paged optimizer back into paged memory.

    bitsandbytes loads a saved state as ordinary tensors, which its next step moves to
    the GPU for good: a run that just fitted runs out of memory after a resume.

    Args:
        optimizer: any optimizer, possibly wrapped by accelerate.

    Returns:
        Number of tensors moved; 0 for an optimizer that is not paged.

    Example:
        >>> import torch
        >>> repage_state(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
        0
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "is_paged", False):
        return 0
    moved = 0
    for parameter, state in inner.state.items():
        for name, saved in list(state.items()):
            if name not in ("state1", "state2") or getattr(saved, "is_paged", False):
                continue
            buffer = inner.get_state_buffer(parameter, dtype=saved.dtype)
            if getattr(buffer, "is_paged", False):  # small tensors are never paged
                buffer.copy_(saved)
                state[name] = buffer
                moved += 1
    return moved
