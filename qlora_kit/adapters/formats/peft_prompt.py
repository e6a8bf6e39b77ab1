"""PEFT's files for prefix-tuning and prompt-tuning: one tensor, `prompt_embeddings`.

    PREFIX_TUNING   (l, 2·L·kv): per position K then V of layer 0, of layer 1, ..., after the MLP
    PROMPT_TUNING   (l, d)

PEFT has positions in front of the tokens only, and neither states in every layer nor, for
prompts, a classifier's head under its name: infixes, PreLayer and classifiers are saved in our
own format (`own.py`). So is a checkpoint to resume from, with the MLP.

Source: peft 0.21.2, peft_model.py (`get_prompt`), tuners/prefix_tuning, tuners/prompt_tuning.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kit.adapters.method import Method
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.core.errors import FormatError

KEY = "prompt_embeddings"
"""The tensor in PEFT's file."""
PEFT_TYPES = ("PREFIX_TUNING", "PROMPT_TUNING")
"""What `peft_type` says."""
OWN_KEYS = {
    "PREFIX_TUNING": "qlora_kit_prefix.values",
    "PROMPT_TUNING": "qlora_kit_prompt.embedding",
}
"""Ending of the parameter's name in a model, which starts with that of the base model."""


def peft_prompt_type(config: Method, heads: tuple[str, ...]) -> str | None:
    """Tell whether PEFT knows a method as it is configured.

    Args:
        config: of any method.
        heads: modules trained whole beside it.

    Returns:
        PEFT's name, or None for our own format.

    Example:
        >>> peft_prompt_type(PrefixTuning(hidden=None), ())
        'PREFIX_TUNING'
        >>> peft_prompt_type(PromptTuning(place="infix"), ()) is None
        True
    """
    if heads or not isinstance(config, PrefixTuning | PromptTuning) or config.place != "prefix":
        return None
    if isinstance(config, PrefixTuning):
        return None if config.hidden is not None else "PREFIX_TUNING"
    return None if config.layers == "all" else "PROMPT_TUNING"


def prompt_config_json(
    kind: str,
    config: Method,
    sizes: Mapping[str, int],
    *,
    task_type: str | None,
    base_path: str | None,
    revision: str | None,
) -> str:
    """Write the text of `adapter_config.json`.

    Args:
        kind: one of `PEFT_TYPES`.
        config: the method's configuration.
        sizes: `token_dim`, `num_attention_heads` and `num_layers` of the model.
        task_type: PEFT's name of the task, or None.
        base_path: folder or hub id of the base.
        revision: of a hub id.

    Returns:
        JSON.

    Example:
        >>> text = prompt_config_json("PROMPT_TUNING", PromptTuning(), {"token_dim": 8},
        ...     task_type="CAUSAL_LM", base_path="m", revision=None)
        >>> json.loads(text)["num_virtual_tokens"]
        10
    """
    assert isinstance(config, PrefixTuning | PromptTuning)
    fields = {
        "peft_type": kind,
        "task_type": task_type,
        "base_model_name_or_path": base_path,
        "revision": revision,
        "inference_mode": True,
        "num_virtual_tokens": config.length,
        "num_transformer_submodules": 1,
        **sizes,
    }
    if kind == "PREFIX_TUNING":
        fields |= {"prefix_projection": False, "encoder_hidden_size": sizes.get("token_dim")}
    else:
        fields |= {"prompt_tuning_init": "RANDOM"}
    return json.dumps(fields, indent=2) + "\n"


def prompt_sizes(fields: Mapping[str, Any]) -> dict[str, int]:
    """Take the model's sizes from PEFT's fields.

    Args:
        fields: of `adapter_config.json`.

    Returns:
        Those that are there.

    Example:
        >>> prompt_sizes({"token_dim": 8, "num_virtual_tokens": 2})
        {'token_dim': 8}
    """
    names = ("token_dim", "num_attention_heads", "num_layers")
    return {name: fields[name] for name in names if fields.get(name)}


def parse_prompt(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path
) -> tuple[PrefixTuning | PromptTuning, dict[str, Tensor]]:
    """Turn PEFT's fields and tensor into a configuration and ours.

    Args:
        fields: of `adapter_config.json`, with a `peft_type` of `PEFT_TYPES`.
        tensors: of `adapter_model.safetensors`.
        where: the folder, for messages.

    Returns:
        The configuration, and the parameter by the ending of its name.

    Raises:
        FormatError: the tensor is missing, or contradicts the configuration.

    Example:
        >>> import torch
        >>> fields = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "token_dim": 8}
        >>> parse_prompt(fields, {"prompt_embeddings": torch.ones(2, 8)}, Path("x"))[0].length
        2
    """
    kind, length = fields["peft_type"], fields.get("num_virtual_tokens")
    columns = fields.get("token_dim") or 0
    if kind == "PREFIX_TUNING":
        columns *= 2 * (fields.get("num_layers") or 0)
    if fields.get("num_transformer_submodules", 1) != 1:
        raise FormatError(f"{where}: a prompt for an encoder and a decoder is not supported.")
    found = tensors.get(KEY)
    if found is None or len(tensors) != 1:
        raise FormatError(
            f"{where}: expected one tensor, {KEY}, got {', '.join(sorted(tensors)) or 'none'}."
        )
    if tuple(found.shape) != (length, columns):
        raise FormatError(
            f"{where}: {KEY} is {tuple(found.shape)}, and adapter_config.json says "
            f"({length}, {columns}): num_virtual_tokens, and token_dim"
            + (" · 2 · num_layers." if kind == "PREFIX_TUNING" else ".")
        )
    dtype: Any = str(found.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise FormatError(f"{where}: {KEY} is {dtype}; expected float32, bfloat16 or float16.")
    config: PrefixTuning | PromptTuning
    if kind == "PREFIX_TUNING":
        config = PrefixTuning(length=int(found.shape[0]), hidden=None, dtype=dtype)
    else:
        config = PromptTuning(length=int(found.shape[0]), dtype=dtype)
    return config, {OWN_KEYS[kind]: found}
