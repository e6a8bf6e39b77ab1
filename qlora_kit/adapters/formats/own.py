"""Adapter folders of methods that PEFT does not know: safetensors, and JSON with a version.

The files are called as PEFT's are, so that everything that looks for an adapter finds one, and
`adapter_config.json` says `"peft_type": "QLORA_KIT"`, so that PEFT refuses it by name:

    adapter_config.json        format_version, method, settings, modules_to_save, task_type
    adapter_model.safetensors  <module>.<key>, the names of `AttachedAdapter.state_dict`
    qlora_kit.json             the base, as beside any adapter of ours (see `peft_config`)

A reader refuses newer versions and settings it does not know, whatever they are: a setting that
is left out has its default, one that is not understood could change the result.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qlora_kit.adapters.method import Method
from qlora_kit.adapters.registry import OTHERS, method_name
from qlora_kit.core.errors import ConfigError, FormatError

OWN_TYPE = "QLORA_KIT"
"""What `peft_type` says."""
OWN_VERSION = 1
"""Of the fields of `adapter_config.json`. A reader refuses newer ones."""


def own_config_json(
    config: Method,
    *,
    modules_to_save: tuple[str, ...],
    task_type: str | None,
    base_path: str | None,
    revision: str | None,
) -> str:
    """Write the text of `adapter_config.json`.

    Args:
        config: of a method in `registry.OTHERS`.
        modules_to_save: names of modules saved whole, a classifier's head.
        task_type: PEFT's name of the task, or None.
        base_path: folder or hub id of the base.
        revision: of a hub id.

    Returns:
        JSON.

    Example:
        >>> from qlora_kit.adapters.selective.config import BitFit
        >>> text = own_config_json(BitFit(), modules_to_save=(), task_type=None, base_path="m",
        ...     revision=None)
        >>> json.loads(text)["method"]
        'bitfit'
    """
    name = method_name(config)
    values = {
        "peft_type": OWN_TYPE,
        "format_version": OWN_VERSION,
        "method": name,
        "settings": asdict(OTHERS[name](**_values(config))),
        "modules_to_save": list(modules_to_save) or None,
        "task_type": task_type,
        "base_model_name_or_path": base_path,
        "revision": revision,
    }
    return json.dumps(values, indent=2) + "\n"


def parse_own_config(values: Mapping[str, Any], *, where: Path) -> Any:
    """Turn the fields of `adapter_config.json` into a configuration.

    Args:
        values: the JSON object, with `peft_type` of ours.
        where: the file, for messages.

    Returns:
        The method's own configuration.

    Raises:
        FormatError: a newer version, an unknown method, or a setting that is unknown or wrong.

    Example:
        >>> values = {"format_version": 1, "method": "top_k", "settings": {"blocks": 3}}
        >>> parse_own_config(values, where=Path("x")).blocks
        3
    """
    version = values.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= OWN_VERSION:
        raise FormatError(
            f"{where}: format_version is {version!r}; this version reads up to {OWN_VERSION}. "
            "Upgrade qlora_kit."
        )
    method, settings = values.get("method"), values.get("settings", {})
    if method not in OTHERS or not isinstance(settings, dict):
        raise FormatError(f"{where}: unknown method {method!r}; known: {', '.join(OTHERS)}.")
    known = {field.name for field in fields(OTHERS[method])}
    if unknown := sorted(settings.keys() - known):
        raise FormatError(
            f"{where}: {method} has no setting {unknown[0]!r}; known: {', '.join(sorted(known))}. "
            "Upgrade qlora_kit if the adapter is newer than it."
        )
    # JSON has lists where settings are tuples
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        return OTHERS[method](**found)
    except (ConfigError, TypeError) as error:
        raise FormatError(f"{where}: {error}") from error


def _values(config: Method) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}  # type: ignore[arg-type]
