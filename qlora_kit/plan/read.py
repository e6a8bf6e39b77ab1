"""A model's configuration from a folder, a GGUF file or the hub: never its weights."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from qlora_kit.checkpoint.gguf import read_gguf_config
from qlora_kit.core.errors import SourceError

CONFIG = "config.json"


def read_config(path_or_id: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """Read a configuration.

    Args:
        path_or_id: a folder with config.json (or one GGUF file), a `.gguf` file, or a hub id,
            of which only config.json is fetched.
        revision: branch, tag or commit of a hub id.

    Returns:
        The configuration, without what it says of quantization: a plan says that itself.

    Raises:
        SourceError: there is none, or the hub cannot be reached.
        FormatError: the GGUF file is damaged or of an unknown model.

    Example:
        >>> read_config("./no/such/folder")
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: './no/such/folder' has no configuration: ...
    """
    path = Path(path_or_id).expanduser()
    file = _gguf_file(path)
    if file is not None:
        return read_gguf_config(file)
    if path.is_dir() and not (path / CONFIG).is_file():
        raise SourceError(
            f"{str(path_or_id)!r} has no {CONFIG}. Copy it there from the original model; a plan "
            "needs nothing else."
        )
    where = str(path) if path.exists() else str(path_or_id)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise SourceError(
            f"{str(path_or_id)!r} has no configuration: it is no folder with a {CONFIG}, no .gguf "
            f"file, and no hub id that can be reached or is in the cache ({first[:160]}). Offline, "
            f"a folder that holds the model's {CONFIG} alone will do."
        ) from error
    assert isinstance(config, PreTrainedConfig)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _gguf_file(path: Path) -> Path | None:
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if path.is_dir() and not (path / CONFIG).is_file():
        found = sorted(path.glob("*.gguf"))
        return found[0] if len(found) == 1 else None
    return None
