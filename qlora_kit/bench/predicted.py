"""What the planner predicts for a measurement, where it knows the case.

Predictions are made from a record, after everything was measured, so that they can be made
again by a later planner, on a machine without a GPU.
"""

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from qlora_kit.bench.components import RESIDENT, REST
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


def in_our_words(components: dict[str, int], *, trains_all: bool) -> dict[str, float]:
    """A plan's components under the names of what is measured, in GiB.

    Args:
        components: bytes by the planner's names.
        trains_all: whether weights and embeddings are trained.

    Returns:
        GiB by the names of `components.py`; whatever comes and goes is the step's.

    Example:
        >>> in_our_words({"weights": GIB, "adapters": GIB, "loss chunk": GIB}, trains_all=False)
        {'weights': 1.0, 'trained': 1.0, 'step': 1.0}
    """
    names = {"norms": "weights", "adapters": "trained", **{name: name for name in RESIDENT}}
    if trains_all:
        names |= dict.fromkeys(("weights", "norms", "embeddings"), "trained")
    found: dict[str, float] = {}
    for name, count in components.items():
        ours = names.get(name, REST)
        found[ours] = found.get(ours, 0.0) + count / GIB
    return {name: found[name] for name in (*RESIDENT, REST) if name in found}


def prediction_of(row: Row, gpu: str, memory_bytes: int) -> Any:
    """What the planner predicts for a row.

    Args:
        row: of ours or of full fine-tuning.
        gpu: name of the device, as the driver gives it.
        memory_bytes: of the device.

    Returns:
        The prediction.

    Raises:
        UserError: the planner does not know the case.
        RuntimeError: the step cannot be traced.

    Example:
        >>> row = {"model": "tiny", "method": "lora", "bits": 4, "rank": 8, "batch": 1, "seq": 64,
        ...     "policy": "save", "optimizer": "adamw_8bit", "masters": "library", "graphs": False}
        >>> prediction_of(row, "h100", 80 << 30).setup.tokens
        64
    """
    predict: Any = import_module("qlora_kit.plan.predict").predict
    setup: Any = import_module("qlora_kit.plan.setup").Setup
    recognise: Any = import_module("qlora_kit.plan.gpus").recognise
    full = row["method"] == "full"
    wanted = setup(
        method=row["method"],
        bits=row["bits"],
        rank=row["rank"] or 1,
        batch=row["batch"],
        seq=row["seq"],
        activations=row["policy"],
        keep_decoded=row.get("keep_decoded", 0),
        embeddings_on_host=bool(row.get("embeddings_on_host")),
        optimizer=row["optimizer"],
        step=row.get("step", "eager" if full else "fused"),
        mixed=row["masters"] == "float32",
        graph=row["graphs"],
        tile=row.get("tile"),
        growing_segments=bool(row.get("growing_segments")),
    )
    machine = recognise(gpu, memory_bytes)
    if row.get("host_us_per_op"):
        machine = replace(machine, host_us=row["host_us_per_op"], host_measured=True)
    return predict(config_of(row["model"]), wanted, machine)


def _predict(row: Row, gpu: str, memory_bytes: int) -> None:
    full = row["method"] == "full"
    if full and (row["head"] != "chunked" or row.get("graph")):  # what users train has neither
        return
    try:
        made = prediction_of(row, gpu, memory_bytes)
    except (UserError, RuntimeError) as error:  # a case it does not know, or cannot trace
        row["not_predicted"] = str(error).splitlines()[0]
        return
    row["predicted_gib"] = made.peak_bytes / GIB
    row["predicted_components_gib"] = in_our_words(made.components, trains_all=full)
    row["predicted_tokens_per_s"] = made.tokens_per_s
    row["predicted_limit"] = made.limited_by
