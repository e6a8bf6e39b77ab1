"""What the planner predicts for a measurement, where it knows the case.

Predictions are made from a record, after everything was measured, so that they can be made
again by a later planner, on a machine without a GPU.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from qlora_kit.bench.record import Row
from qlora_kit.bench.shapes import config_of
from qlora_kit.core.errors import UserError
from qlora_kit.core.units import GIB


def has_planner() -> bool:
    """Whether this version can predict."""
    return find_spec("qlora_kit.plan") is not None and (
        find_spec("qlora_kit.plan.predict") is not None
    )


def add_predictions(record: dict[str, Any]) -> None:
    """Put `predicted_gib`, its components and `predicted_tokens_per_s` into a record's rows.

    Args:
        record: of memory or speed, changed in place. Rows of peers, of a machine without a GPU
            and of cases that the planner does not know get a `predicted_gib` of None.

    Example:
        >>> record = {"gpu": None, "rows": [{"impl": "qlora_kit"}]}
        >>> add_predictions(record)
        >>> record["rows"][0]["predicted_gib"] is None
        True
    """
    known = has_planner() and record["gpu"] is not None
    for row in record["rows"]:
        row["predicted_gib"] = None
        if known and row["impl"] in ("qlora_kit", "full"):
            _predict(row, record["gpu"], record["gpu_memory_bytes"])


def _predict(row: Row, gpu: str, memory_bytes: int) -> None:
    predict: Any = import_module("qlora_kit.plan.predict").predict
    setup: Any = import_module("qlora_kit.plan.setup").Setup
    recognise: Any = import_module("qlora_kit.plan.gpus").recognise
    full = row["method"] == "full"
    if full and (row["masters"] != "float32" or row["head"] != "chunked"):
        return
    try:
        made = predict(
            config_of(row["model"]),
            setup(
                method=row["method"],
                bits=row["bits"],
                rank=row["rank"] or 16,
                batch=row["batch"],
                seq=row["seq"],
                activations=row["policy"],
                optimizer=row["optimizer"],
                step="eager" if full else "auto",
            ),
            recognise(gpu, memory_bytes),
        )
    except UserError as error:  # a case it does not know
        row["not_predicted"] = str(error)
        return
    row["predicted_gib"] = made.peak_bytes / GIB
    row["predicted_components_gib"] = {k: v / GIB for k, v in made.components.items()}
    row["predicted_tokens_per_s"] = made.tokens_per_s
