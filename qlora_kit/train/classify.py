"""Sequence classifiers: what differs from a language model in a run.

The head is new and trained whole beside the adapter (the adapter finds it by
itself); classes have names that the exported model should keep; and a merged
classifier is compared with the unmerged one by its classes instead of tokens.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.errors import DataError
from qlora_kit.export.deviation import Deviation
from qlora_kit.train.held_out import to_device


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Fields of a Transformers configuration that name the classes.

    Args:
        names: in the order of their ids.

    Returns:
        `id2label` and `label2id`.

    Example:
        >>> label_fields(["no", "yes"])
        {'id2label': {0: 'no', 1: 'yes'}, 'label2id': {'no': 0, 'yes': 1}}
    """
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def name_classes(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Give a classifier's classes their names.

    Args:
        model: its configuration is modified.
        names: in the order of their ids.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertForSequenceClassification(BertConfig(
        ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16))
        >>> name_classes(tiny, ["no", "yes"])
        >>> tiny.config.id2label[1]
        'yes'
    """
    for field, value in label_fields(names).items():
        setattr(model.config, field, value)


def name_saved_classes(folder: Path, names: Sequence[str]) -> None:
    """Give the classes of a saved classifier their names.

    Args:
        folder: holds `config.json`, which is rewritten.
        names: in the order of their ids.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text("{}")
        >>> name_saved_classes(folder, ["no", "yes"])
        >>> json.loads((folder / "config.json").read_text())["label2id"]
        {'no': 0, 'yes': 1}
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    atomic_write_text(path, json.dumps(config | label_fields(names), indent=2) + "\n")


def compare_classifiers(
    reference: PreTrainedModel, other: PreTrainedModel, batches: Iterable[dict[str, Any]]
) -> Deviation:
    """Compare two classifiers on the same rows.

    Args:
        reference: the model as it was trained.
        other: for example the merged one; may live on another device.
        batches: collated rows with `labels` (B,).

    Returns:
        KL divergence, same likeliest class and both losses, as means over rows.

    Raises:
        DataError: there are no rows.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertForSequenceClassification(BertConfig(
        ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)).eval()
        >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([1])}
        >>> compare_classifiers(tiny, tiny, [batch]).top1_agreement
        1.0
    """
    totals, rows = torch.zeros(4, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches:
            logs = []
            for model in (reference, other):
                inputs = to_device(batch, model.device)
                inputs.pop("labels")
                logs.append(model(**inputs).logits.double().cpu().log_softmax(dim=-1))
            ours, theirs = logs
            labels = batch["labels"].cpu()
            totals[0] += F.kl_div(theirs, ours, log_target=True, reduction="sum")
            totals[1] += (ours.argmax(-1) == theirs.argmax(-1)).sum()
            totals[2] += F.nll_loss(ours, labels, reduction="sum")
            totals[3] += F.nll_loss(theirs, labels, reduction="sum")
            rows += labels.numel()
    if rows == 0:
        raise DataError("there are no rows to compare the two models on.")
    kl, agreement, loss_reference, loss_other = (totals / rows).tolist()
    return Deviation(
        kl=max(kl, 0.0),
        top1_agreement=agreement,
        loss_reference=loss_reference,
        loss_other=loss_other,
        tokens=rows,
    )
