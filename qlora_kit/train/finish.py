"""After training: the merged model, and proof that it answers as the unmerged one does."""

import gc
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from qlora_kit.core.units import format_bytes
from qlora_kit.export.deviation import Deviation, compare
from qlora_kit.export.merge import merge
from qlora_kit.load.model import load
from qlora_kit.nn.host_embedding import base_dtype
from qlora_kit.train.classify import compare_classifiers, name_saved_classes
from qlora_kit.train.config import RunConfig
from qlora_kit.train.data.collate import make_collator
from qlora_kit.train.data.tokenized import TokenizedSet
from qlora_kit.train.held_out import sample_rows
from qlora_kit.train.record import Stages
from qlora_kit.train.workspace import Workspace

CHECK_ROWS = 64
"""Held-out rows on which the merged model is compared with the unmerged one."""
CHECK_BATCH = 8
"""Rows per batch of that comparison: full logits of both models exist for one batch."""


def merge_and_check(
    config: RunConfig,
    space: Workspace,
    model: PreTrainedModel,
    sets: dict[str, TokenizedSet],
    *,
    base: str,
    stages: Stages,
) -> dict[str, Any]:
    """Write the merged model and compare it with the model in memory.

    Args:
        config: the run; `export` says how.
        space: its folder; the adapter is saved already.
        model: trained, adapter attached.
        sets: data by name; the first held-out set is compared on.
        base: where the base is.
        stages: times both parts.

    Returns:
        The merge's summary and the deviation, as plain values for the record.

    Example:
        >>> merge_and_check.__name__  # a whole use: qlora_kit.train.run
        'merge_and_check'
    """
    with stages.stage("merge"):
        summary = merge(
            base,
            space.adapter,
            space.merged,
            into=config.export.into,
            dtype=config.export.dtype,
            max_shard=config.export.max_shard_size,
            overwrite=True,
            device=str(model.device),
            revision=config.model.revision,
        )
        labels = sets["train"].label_names
        if labels:
            name_saved_classes(space.merged, labels)
    found: dict[str, Any] = {
        "into": summary.into,
        "dtype": summary.dtype,
        "merged": summary.merged,
        "nbytes": summary.nbytes,
        "files": summary.files,
        "notes": list(summary.notes),
        "deviation": None,
        "deviation_text": None,
        "unchecked": None,
    }
    data = next((data for name, data in sets.items() if name != "train"), None)
    if data is None:
        found["unchecked"] = "there are no held-out rows"
        return found
    gc.collect()
    lacking = _lacking_memory(model, summary.nbytes, config.export.dtype)
    if lacking:
        found["unchecked"] = lacking
        return found
    with stages.stage("check"):
        deviation = _check(config, space, model, data)
    found["deviation"] = asdict(deviation)
    found["deviation_text"] = str(deviation)
    return found


def _lacking_memory(model: PreTrainedModel, nbytes: int, dtype: str) -> str | None:
    """Say so if the merged model does not fit beside the one in memory."""
    needed = nbytes * base_dtype(model).itemsize // getattr(torch, dtype).itemsize
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed < 0.9 * free:
        return None
    room = f"{format_bytes(free)} are free"
    return f"it needs {format_bytes(needed)} beside the unmerged one, and {room}"


def _check(
    config: RunConfig, space: Workspace, model: PreTrainedModel, data: TokenizedSet
) -> Deviation:
    attention = config.model.attention
    merged, _ = load(
        space.merged,
        quant=None,
        dtype=base_dtype(model),
        device=model.device,
        task=config.model.task,
        attn=None if attention == "auto" else attention,
    )
    model.eval()
    if config.model.task == "sequence_classification":
        return compare_classifiers(model, merged, _batches(data))
    return compare(model, merged, _batches(data))


def _batches(data: TokenizedSet) -> Iterator[dict[str, Any]]:
    rows = sorted(sample_rows(len(data), CHECK_ROWS), key=lambda row: data.lengths[row])
    collate = make_collator(data)
    for start in range(0, len(rows), CHECK_BATCH):
        yield collate([data[row] for row in rows[start : start + CHECK_BATCH]])
