"""A model folder, opened without building a model or reading a weight.

`open_source` answers, from headers alone, what loading, planning and exporting
ask: which tensors there are, how large, in which file, whether they are NF4
already, and which other files (tokenizer, chat template) belong to the model.
Weights are then read one by one, each into memory of its own.

Formats are decided here once. Safetensors are read, GGUF is converted to
safetensors first (`gguf.py`), pickles are refused because opening one runs code,
and 4-bit or 8-bit formats other than NF4 are refused by name: they cannot be
turned into the 16-bit or NF4 base this package trains on without loss that
nobody asked for.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.checkpoint.locate import locate
from qlora_kit.checkpoint.tensor_file import TensorInfo, read_header, read_tensor
from qlora_kit.checkpoint.writer import INDEX_NAME, SINGLE_NAME
from qlora_kit.core.errors import FormatError, SourceError
from qlora_kit.quant.config import BLOCK_SIZES, QuantConfig
from qlora_kit.quant.format import COMPANION_SUFFIXES, STATE_SUFFIX, from_bnb_tensors
from qlora_kit.quant.weight import NF4Weight

OUR_QUANT_METHOD = "qlora_kit_nf4"
SIDE_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Source:
    """A checkpoint folder whose headers were read; see `open_source`.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> safetensors.torch.save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        >>> _ = (folder / "config.json").write_text('{"model_type": "llama"}')
        >>> source = open_source(folder)
        >>> source.tensors["w"].shape, source.is_nf4, source.read("w").sum().item()
        ((2,), False, 2.0)
    """

    folder: Path
    """Local folder with config.json and safetensors."""
    config: dict[str, Any]
    """config.json."""
    tensors: dict[str, TensorInfo]
    """Every stored tensor by name, NF4 companions included."""

    @property
    def is_nf4(self) -> bool:
        """Whether the linears are stored as NF4, by bitsandbytes or by this package."""
        return bool(self.config.get("quantization_config"))

    @cached_property
    def _quantized(self) -> frozenset[str]:
        """Names of NF4 weights, found by the marker tensor each one has."""
        return frozenset(
            name.removesuffix(STATE_SUFFIX) for name in self.tensors if name.endswith(STATE_SUFFIX)
        )

    def quantized_names(self) -> frozenset[str]:
        """Names of the weights stored as NF4.

        Returns:
            Names as in the unquantized model, such as `model.layers.0.mlp.up_proj.weight`.
        """
        return self._quantized

    def weight_names(self) -> Iterator[str]:
        """Names of weights in stored order, NF4 companions left out.

        Yields:
            Each name `read_weight` accepts, once.
        """
        for name in self.tensors:
            if not any(
                name.endswith(suffix) and name.removesuffix(suffix) in self._quantized
                for suffix in COMPANION_SUFFIXES
            ):
                yield name

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, for one stored as NF4 that of the matrix it stands for.

        Args:
            name: one of `weight_names`.

        Returns:
            The shape.

        Raises:
            FormatError: there is no such weight, or its NF4 state is malformed.
        """
        if name not in self._quantized:
            return self._info(name).shape
        return tuple(self._state(name)["shape"])

    def weight_dtype(self, name: str) -> torch.dtype:
        """Dtype of a weight, for one stored as NF4 that of the weight it was made from.

        Args:
            name: one of `weight_names`.

        Returns:
            The dtype.

        Raises:
            FormatError: there is no such weight, or its NF4 state is malformed.
        """
        if name not in self._quantized:
            return self._info(name).dtype
        return getattr(torch, self._state(name)["dtype"])

    def quant_of(self, name: str) -> QuantConfig:
        """How one NF4 weight is stored.

        Args:
            name: one of `quantized_names`.

        Returns:
            Its block size and double quantization; the patterns are the defaults.

        Raises:
            FormatError: its NF4 state is malformed.
        """
        nested = f"{name}.nested_absmax" in self.tensors
        return QuantConfig(block_size=self._state(name)["blocksize"], double_quant=nested)

    def _state(self, name: str) -> dict[str, Any]:
        """The JSON of an NF4 weight; the rest of it is checked when the weight is read."""
        try:
            state = json.loads(bytes(self.read(name + STATE_SUFFIX).tolist()))
            known = isinstance(state["shape"], list) and hasattr(torch, state["dtype"])
            known = known and state["blocksize"] in BLOCK_SIZES
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{name}{STATE_SUFFIX} is damaged: {error!r}.") from error
        if not known:
            raise FormatError(f"{name}{STATE_SUFFIX} is damaged: {state}.")
        return state

    def read(self, name: str) -> Tensor:
        """Read one stored tensor.

        Args:
            name: a key of `tensors`.

        Returns:
            The tensor on the CPU, shape and dtype as stored.

        Raises:
            FormatError: there is no such tensor, or its file is broken.
        """
        return read_tensor(self.folder, self._info(name))

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise FormatError(f"{self.folder} holds no tensor {name!r}.")
        return self.tensors[name]

    def read_weight(self, name: str) -> Tensor | NF4Weight:
        """Read one weight, gathering the tensors an NF4 weight consists of.

        Args:
            name: one of `weight_names`.

        Returns:
            An `NF4Weight` if it is stored as one, else the tensor as stored.

        Raises:
            FormatError: there is no such weight, or its NF4 tensors are malformed.
        """
        if name not in self._quantized:
            return self.read(name)
        parts = {
            suffix: self.read(name + suffix)
            for suffix in ("", *COMPANION_SUFFIXES)
            if name + suffix in self.tensors
        }
        return from_bnb_tensors(parts, name=name)

    def side_files(self) -> list[Path]:
        """Files that belong to the model besides config and weights.

        Returns:
            Tokenizer, chat template, generation config and license files (and the
            folder of additional templates), sorted.
        """
        found = {path for pattern in SIDE_PATTERNS for path in self.folder.glob(pattern)}
        return sorted(path for path in found if path.suffix != ".safetensors")

    def copy_side_files(self, destination: Path) -> None:
        """Copy `side_files` into another folder.

        Args:
            destination: an existing folder; files of the same name are replaced.
        """
        for path in self.side_files():
            if path.is_dir():
                shutil.copytree(path, destination / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, destination / path.name)


def open_source(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    cache_dir: str | Path | None = None,
) -> Source:
    """Open a model from a folder, a GGUF file or the hub, reading headers only.

    Args:
        path_or_id: a folder with config.json and (sharded) safetensors; a `.gguf` file
            or a folder with one, converted once and cached; a hub id such as
            `org/model`, or `org/model/file.gguf`.
        revision: branch, tag or commit of a hub id.
        offline: True: only what the hub cache holds. None: as HF_HUB_OFFLINE says.
        cache_dir: hub cache folder; the hub library's own by default.

    Returns:
        The opened source.

    Raises:
        SourceError: nothing is there, or what is there is no model that can be read.
        FormatError: a file is malformed, or quantized in another way than NF4.

    Example:
        >>> open_source("./no/such/folder")
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: './no/such/folder' does not exist.
    """
    folder = locate(path_or_id, revision=revision, offline=offline, cache_dir=cache_dir)
    gguf_file = _gguf_file(folder)
    if gguf_file is not None:
        from qlora_kit.checkpoint.gguf import convert_cached

        folder = convert_cached(gguf_file)
    if folder.is_file():
        raise SourceError(
            f"{folder} is a file. Name the folder that holds config.json and the weights"
            + (f": {folder.parent}." if folder.suffix == ".safetensors" else ", or a .gguf file.")
        )
    tensors = _read_headers(folder)
    config = _read_json(folder / "config.json", "Without it the architecture is unknown.")
    _refuse_other_quantization(config, folder)
    return Source(folder=folder, config=config, tensors=tensors)


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file meant by a path: itself, or the only one in a folder without safetensors."""
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    if not found or any(path.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise SourceError(
            f"{path} holds several GGUF files; name one: {', '.join(file.name for file in found)}."
        )
    return found[0]


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Headers of all weight files, checked against the index if there is one."""
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map = _read_json(index_path, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{index_path} has no weight_map. Download it again.")
        files = sorted(set(weight_map.values()))
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise FormatError(f"{index_path} names {file!r}, which is no file of that folder.")
        infos = {name: info for file in files for name, info in _header(folder, file).items()}
        for name, file in weight_map.items():
            if name not in infos or infos[name].file != file:
                raise FormatError(
                    f"{index_path} says {name!r} is in {file}, but it is not. The checkpoint is "
                    "incomplete or mixed from two; download it again."
                )
        return infos
    if (folder / SINGLE_NAME).is_file():
        return _header(folder, SINGLE_NAME)
    return _headers_without_index(folder)


def _headers_without_index(folder: Path) -> dict[str, TensorInfo]:
    """Headers of a folder with neither the usual file nor an index, or the reason why not."""
    files = sorted(
        path.name
        for path in folder.glob("*.safetensors")
        if not path.name.startswith(("adapter_model", "consolidated"))
    )
    if len(files) == 1:
        return _header(folder, files[0])
    if files:
        raise SourceError(
            f"{folder} holds {len(files)} safetensors files but no {INDEX_NAME} that says which "
            "belong to the model. Copy the index too, or download the model again."
        )
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"{folder} is an adapter, not a model. Name its base model here and give this folder "
            "as the adapter."
        )
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise SourceError(
            f"{folder} holds only pickled weights (.bin, .pt), and opening a pickle can run any "
            "code in it. Look for a revision with .safetensors on the hub, or convert a copy you "
            "trust: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise SourceError(
        f"{folder} holds no model: needed config.json and *.safetensors (or one .gguf file). "
        f"It has: {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}."
    )


def _header(folder: Path, file: str) -> dict[str, TensorInfo]:
    return read_header(folder / file)


def _read_json(path: Path, why: str) -> dict[str, Any]:
    """Read a JSON object from a checkpoint folder."""
    if not path.is_file():
        raise SourceError(f"{path} is missing. {why} Copy it from the original model.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def _refuse_other_quantization(config: dict[str, Any], folder: Path) -> None:
    """Let only NF4 and unquantized checkpoints pass."""
    quant = config.get("quantization_config")
    if not quant:
        return
    method = quant.get("quant_method", "unknown")
    if method == OUR_QUANT_METHOD:
        return
    if method == "bitsandbytes":
        kind = quant.get("bnb_4bit_quant_type", "fp4")
        if quant.get("load_in_4bit") and kind == "nf4":
            return
        method = f"bitsandbytes {kind}" if quant.get("load_in_4bit") else "bitsandbytes int8"
    raise FormatError(
        f"{folder} is quantized with {method}; only NF4 and unquantized (16- or 32-bit) models can "
        "be used. Name the original 16-bit model instead: it is quantized to NF4 while it loads."
    )
