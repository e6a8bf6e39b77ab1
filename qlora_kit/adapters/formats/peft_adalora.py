"""AdaLoRA's part of PEFT's `adapter_config.json`, in both directions.

PEFT keeps the schedule in the file and insists on a number of updates for it; an adapter
whose run decided its phases by shares is written with the shortest schedule that PEFT takes,
which matters only to one who trains on with PEFT. Files that PEFT wrote after its last
distribution hold the kept triplets only, with the start rank in `init_r`; they are read as
they are. PEFT divides by r₀ + 1e-5, which is r₀ to float32's eyes.

Source: peft 0.21.2, tuners/adalora/config.py and model.py.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget

PEFT_TYPE = "ADALORA"


def adalora_fields(config: AdaLoRA) -> dict[str, Any]:
    """What stands in `adapter_config.json` for AdaLoRA and not for LoRA.

    Args:
        config: the method's configuration.

    Returns:
        JSON fields, to go over those of a LoRA.

    Example:
        >>> adalora_fields(AdaLoRA())["init_r"], adalora_fields(AdaLoRA())["target_r"]
        (12, 8)
    """
    budget = config.budget
    start, final = budget.start_updates or 0, budget.final_updates or 0
    return {
        "peft_type": PEFT_TYPE,
        "r": 8,  # not used, and another value makes PEFT warn
        "init_r": config.rank,
        "target_r": config.target_rank,
        "tinit": start,
        "tfinal": final,
        "total_step": start + final + 1,
        "deltaT": budget.every,
        "beta1": budget.beta1,
        "beta2": budget.beta2,
        "orth_reg_weight": budget.orthogonality,
        "rank_pattern": None,
        "init_lora_weights": True,
    }


def parse_adalora(fields: Mapping[str, Any]) -> AdaLoRA:
    """Turn the fields of `adapter_config.json` into a configuration.

    Args:
        fields: the JSON object, of type ADALORA.

    Returns:
        Ranks, alpha, dropout and schedule. Targets and dtype are not known here.

    Example:
        >>> parse_adalora({"init_r": 6, "target_r": 4, "lora_alpha": 3}).scale_of("proj")
        0.5
    """
    rank = int(fields.get("init_r", 12))  # this and the others: PEFT's defaults
    alpha = float(fields.get("lora_alpha", 8))
    return AdaLoRA(
        rank=rank,
        alpha=alpha if alpha > 0 else float(rank),
        dropout=float(fields.get("lora_dropout") or 0.0),
        budget=RankBudget(
            target_rank=min(rank, int(fields.get("target_r", 8))),
            start_updates=int(fields.get("tinit", 0)),
            final_updates=int(fields.get("tfinal", 0)),
            every=int(fields.get("deltaT", 1)),
            beta1=float(fields.get("beta1", 0.85)),
            beta2=float(fields.get("beta2", 0.85)),
            orthogonality=float(fields.get("orth_reg_weight", 0.5)),
        ),
    )


def side_fields(config: object) -> dict[str, Any]:
    """What `qlora_kit.json` records of the budget, which PEFT's file has no place for.

    Args:
        config: of any method.

    Returns:
        JSON fields; none for other methods.

    Example:
        >>> side_fields(AdaLoRA())["budget"]["orthogonality_form"]
        'code'
    """
    return {"budget": asdict(config.budget)} if isinstance(config, AdaLoRA) else {}


def with_side_fields(config: AdaLoRA, fields: Mapping[str, Any]) -> AdaLoRA:
    """Put back what `side_fields` recorded.

    Args:
        config: as PEFT's file has it.
        fields: of `qlora_kit.json`.

    Returns:
        The configuration the adapter was trained with.

    Example:
        >>> config = AdaLoRA(budget=RankBudget(orthogonality_form="paper"))
        >>> with_side_fields(AdaLoRA(), side_fields(config)) == config
        True
    """
    found = fields.get("budget")
    return config if found is None else replace(config, budget=RankBudget(**found))
