"""`train.deterministic`: the same bits in every run, without what they do not need.

transformers' `enable_full_determinism` asks torch for repeatable kernels. With them torch fills
all memory that it hands out, so that a program which reads what it has not written does that
repeatably as well: every buffer is written once more. Ours reads nothing that it has not written.
And it leaves cuBLAS 128 KiB to work in, where 32 MiB are usual; of the two settings with which
cuBLAS repeats its bits the other one is 32 MiB.
"""

import os

import torch
from transformers import TrainingArguments

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"
"""Eight pieces of 4,096 KiB."""


def repeat_cheaply(args: TrainingArguments) -> None:
    """Undo what full determinism costs without need; call it after the Trainer asked for that.

    Args:
        args: of the run.

    Example:
        >>> before = torch.utils.deterministic.fill_uninitialized_memory
        >>> repeat_cheaply(TrainingArguments(use_cpu=True))  # not asked for: nothing changes
        >>> torch.utils.deterministic.fill_uninitialized_memory == before
        True
    """
    if not args.full_determinism:
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ[CUBLAS] = WORKSPACE
