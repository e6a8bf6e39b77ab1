"""Ship an adapter on its own: checked, and nothing but the adapter.

A training folder holds checkpoints, optimizer state and logs beside the adapter.
What others load is three files, plus the tokenizer it was trained with. The copy
is read and written, not just copied, so a damaged or contradictory adapter is
found here and not by whoever downloads it.
"""

import math
from dataclasses import replace
from pathlib import Path

from qlora_kit.adapters.formats.peft import read_adapter, write_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.checkpoint.source import Source
from qlora_kit.core.atomic import atomic_directory


def export_adapter(
    adapter: str | Path, out: str | Path, *, plain_scale: bool = False, overwrite: bool = False
) -> Path:
    """Copy an adapter in PEFT's format into a folder of its own.

    Args:
        adapter: folder of the adapter; other files in it are left behind.
        out: folder to create.
        plain_scale: write rsLoRA as plain LoRA with alpha·√rank, for readers that
            ignore `use_rslora` (llama.cpp).
        overwrite: replace `out` if it exists.

    Returns:
        The folder.

    Raises:
        SourceError: no adapter is there, or `out` exists.
        FormatError: the adapter is malformed.

    Example:
        >>> export_adapter("none", "out")
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: none is not an adapter folder: ...
    """
    files = read_adapter(adapter)
    old = files.config
    if plain_scale and isinstance(old, LoRA) and old.rslora:
        own = old.rank_pattern or old.alpha_pattern  # then each module has an alpha of its own
        alphas = {name: pair.scale * old.rank_of(name) for name, pair in files.deltas.items()}
        config = replace(
            old,
            rslora=False,
            alpha=old.alpha * math.sqrt(old.rank),
            alpha_pattern=alphas if own else {},
        )
        files = replace(files, config=config)
    with atomic_directory(Path(out), overwrite=overwrite) as folder:
        write_adapter(folder, files, overwrite=True)
        Source(folder=Path(adapter), config={}, tensors={}).copy_side_files(folder)
    return Path(out)
