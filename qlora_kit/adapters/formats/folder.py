"""The files of an adapter folder: their names, and reading the weights."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_kit.core.errors import FormatError, SourceError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIDE_FILE = "qlora_kit.json"


def weights_path(folder: Path) -> Path:
    """Find the weights of an adapter.

    Args:
        folder: of the adapter.

    Returns:
        The safetensors file.

    Raises:
        SourceError: a file is missing, or the weights are a pickle.

    Example:
        >>> weights_path(Path("nowhere"))
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: nowhere is not an adapter folder: ...
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_file():
            continue
        if name == WEIGHTS_FILE and (folder / "adapter_model.bin").exists():
            raise SourceError(
                f"{folder} holds its weights as a pickle (adapter_model.bin), which is not opened "
                "because it can run code. Load it with the library that made it and save it "
                "again with safe_serialization=True."
            )
        raise SourceError(f"{folder} is not an adapter folder: {name} is missing.")
    return folder / WEIGHTS_FILE


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Args:
        weights: a safetensors file.

    Returns:
        Key to tensor on the CPU.

    Raises:
        FormatError: the file is broken.

    Example:
        >>> read_tensors(Path("nowhere"))
        Traceback (most recent call last):
        qlora_kit.core.errors.FormatError: nowhere is not a readable safetensors file: ...
    """
    try:
        found: dict[str, Tensor] = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{weights} is not a readable safetensors file: {error}.") from error
    return found
