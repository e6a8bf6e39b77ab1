"""What every worker needs, made once: the base models, the tokenizer, the tokenized rows.

The first worker reads the checkpoint, quantizes it and tokenizes; the others find files, which
hold whole modules, so that a worker has its model after one read and one copy to the GPU. There
it stays as it is: a job trains a copy. Loading a checkpoint for every job cost more than many a
training, and where processes take turns at a GPU, its hundreds of small waits cost ten times that.

The files are pickles: for the same machine and commit, in the run's own folder.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.checkpoint.source import Source
from qlora_kit.core.errors import UserError
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig


def _write(value: object, file: Path) -> None:
    """Write a pickle that is whole whenever it is there."""
    half = file.with_suffix(f".{os.getpid()}")
    torch.save(value, half)
    half.replace(file)


class Stock:
    """Models and rows, from files where there are any, else made and kept as files."""

    def __init__(self, source: Source, folder: Path) -> None:
        """Read nothing yet.

        Args:
            source: of the model.
            folder: shared by the workers.
        """
        self.source = source
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._bases: dict[int, PreTrainedModel] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._sets: dict[str, Any] = {}

    def base(self, bits: int) -> PreTrainedModel:
        """A copy of a base model to train, on the GPU if there is one.

        Args:
            bits: 4 for NF4, 16.

        Returns:
            The model, nothing attached to it.
        """
        if bits not in self._bases:
            self._bases[bits] = self._base(bits)
        return copy.deepcopy(self._bases[bits])

    def _base(self, bits: int) -> PreTrainedModel:
        file = self.folder / f"base-{bits}.pt"
        place = "cuda" if torch.cuda.is_available() else "cpu"
        if file.exists():
            model = torch.load(file, map_location=place, weights_only=False)
        else:
            quant = QuantConfig() if bits == 4 else None
            model, tokenizer = load(self.source.folder, quant=quant)
            _write(model, file)
            _write(tokenizer, self.folder / "tokenizer.pt")
        assert isinstance(model, PreTrainedModel)
        return model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's.

        Raises:
            UserError: it has none.
        """
        if self._tokenizer is None:
            file = self.folder / "tokenizer.pt"
            if not file.exists():
                self._bases[4] = self._base(4)
            self._tokenizer = torch.load(file, weights_only=False)
        if self._tokenizer is None:
            raise UserError(f"{self.source.folder} has no tokenizer")
        return self._tokenizer

    def rows(self, name: str) -> Any | None:
        """Rows that were kept under a name; None if there are none."""
        if name not in self._sets:
            file = self.folder / f"rows-{name}.pt"
            if not file.exists():
                return None
            self._sets[name] = torch.load(file, weights_only=False)
        return self._sets[name]

    def keep(self, name: str, rows: Any) -> Any:
        """Keep tokenized rows under a name, for the other workers too."""
        _write(rows, self.folder / f"rows-{name}.pt")
        self._sets[name] = rows
        return rows
