"""`AdapterBank`: adapters side by side on one model. `load.py` tells what for.

The bank knows names and pieces (`pieces.py`, one for each module that some adapter
changes) and tells all pieces who answers. A module that no adapter changes any more is put
back as it was.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.adapters.attached import ATTACHED
from qlora_kit.adapters.fit import plain_modules, whole_places
from qlora_kit.adapters.formats.peft import AdapterFiles, write_adapter
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.multi_adapter.batch_rows import BatchRows, Form
from qlora_kit.adapters.multi_adapter.combine import combined_pair, combined_values
from qlora_kit.adapters.multi_adapter.files import plain_files, read_low_rank
from qlora_kit.adapters.multi_adapter.pieces import (
    HeldPair,
    SharedEmbedding,
    SharedLinear,
    SharedLowRank,
    SharedModule,
    SharedPiece,
    held_copy,
    is_pair,
)
from qlora_kit.adapters.targets import inside, whole_modules
from qlora_kit.core.errors import AdapterError
from qlora_kit.core.units import format_bytes


class AdapterBank:
    """Adapters loaded side by side on one model; `load_adapters` makes it.

    Example:
        >>> bank = AdapterBank(nn.ModuleDict({"proj": nn.Linear(8, 4)}))
        >>> bank.names, bank.active, bank.nbytes
        ((), None, 0)
    """

    def __init__(self, model: nn.Module) -> None:
        """Start empty; users call `load_adapters`.

        Args:
            model: without an adapter. Its parameters are frozen until the bank is removed.
        """
        self.model = model
        self.active: str | None = None
        """Who answers all rows; None: the base."""
        self._names: list[str] = []
        self._pieces: dict[str, SharedPiece] = {}
        self._rows: BatchRows | None = None
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        setattr(model, ATTACHED, "a bank of several")

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, combinations included, in the order they came."""
        return tuple(self._names)

    @property
    def nbytes(self) -> int:
        """Memory of all adapters, without what the base takes."""
        held = (t for piece in self._pieces.values() for t in piece.held.parameters())
        return sum(t.numel() * t.element_size() for t in held)

    def add(self, name: str, folder: Path | str) -> None:
        """Load one more.

        Args:
            name: of your choice, not yet taken.
            folder: an adapter folder.

        Raises:
            SourceError: a file is missing.
            FormatError: a file is malformed or of a method that is not supported.
            AdapterError: it does not fit, is no LoRA, or the name is taken.
        """
        self.add_files(name, read_low_rank(self.model, folder))

    def add_files(self, name: str, files: AdapterFiles) -> None:
        """Add an adapter that is in memory.

        Args:
            name: not yet taken.
            files: of a LoRA that fits the model.

        Raises:
            AdapterError: the name is taken or empty, or modules are not as the model's or as
                another adapter's.
        """
        self._refuse_inside("add")
        if not name or name in self._names:
            raise AdapterError(f"an adapter needs a new name, got {name!r}. {self._known()}")
        modules = plain_modules(self.model)
        made = [*self._pairs(files, modules), *self._copies(files, modules)]
        self._names.append(name)
        for piece, held in made:
            if piece.place not in self._pieces:
                piece.install(self.model)
                self._pieces[piece.place] = piece
            piece.hold(name, held)
        self._choose()

    def _pairs(
        self, files: AdapterFiles, modules: Mapping[str, nn.Module]
    ) -> Iterator[tuple[SharedPiece, nn.Module]]:
        for place, saved in files.deltas.items():
            pair, base = saved.folded(), modules[place]
            if pair.a.shape[0] == 0:
                continue  # AdaLoRA may leave a module without any rank
            kind = SharedEmbedding if pair.embedding else SharedLinear
            yield self._piece(kind, base, place), HeldPair(pair, next(base.parameters()).device)

    def _copies(
        self, files: AdapterFiles, modules: Mapping[str, nn.Module]
    ) -> Iterator[tuple[SharedPiece, nn.Module]]:
        left = dict(files.modules)
        for place in whole_places(self.model, files):
            names = [name for name in left if name.startswith(f"{place}.")]
            values = {name.removeprefix(f"{place}."): left.pop(name) for name in names}
            piece = self._piece(SharedModule, modules[place], place)
            yield piece, held_copy(piece.base, place, values, getattr(torch, files.config.dtype))
        if left:
            raise AdapterError(
                f"the adapter was saved with {next(iter(left))}, which {type(self.model).__name__} "
                "does not have. Load the base as the model class it was trained as."
            )

    def _piece(self, kind: type[SharedPiece], base: nn.Module, place: str) -> SharedPiece:
        """The piece at a place; a new one, not installed yet, where there is none."""
        kept = self._pieces.get(place)
        others = [p for p in self._pieces if p != place]
        overlap = [p for p in others if inside(p, {place}) or inside(place, {p})]
        if overlap or (kept is not None and type(kept) is not kind):
            raise AdapterError(
                f"one adapter has {overlap[0] if overlap else place} trained whole and another a "
                f"low-rank change of {place}. Remove the one that is there first."
            )
        return kind(base, place) if kept is None else kept

    def remove(self, name: str) -> None:
        """Forget an adapter; where it answered all rows, the base does from now on.

        Args:
            name: of the adapter. Combinations that it went into stay.

        Raises:
            AdapterError: there is none of this name.
        """
        self._refuse_inside("remove")
        self._check(name)
        self._names.remove(name)
        for place, piece in list(self._pieces.items()):
            piece.drop(name)
            if not piece.names:
                piece.uninstall(self.model)
                del self._pieces[place]
        self.active = None if self.active == name else self.active
        self._choose()

    def use(self, name: str | None) -> None:
        """Let one adapter answer all rows from now on.

        Args:
            name: of the adapter, or None for the base alone.

        Raises:
            AdapterError: there is none of this name.
        """
        self._refuse_inside("use")
        if name is not None:
            self._check(name)
        self.active = name
        self._choose()

    def combine(self, name: str, weights: Mapping[str, float]) -> None:
        """Make an adapter whose change is a linear combination of others', exactly.

        Its rank is the sum of theirs, and so is its memory.

        Args:
            name: of the new adapter, not yet taken.
            weights: adapter to its factor, of any sign; 0 leaves it out.

        Raises:
            AdapterError: an adapter is unknown, no factor is left, or modules that were trained
                whole from a random start would be scaled.
        """
        for part in weights:
            self._check(part)
        used = {part: float(weight) for part, weight in weights.items() if weight}
        if not used or not all(math.isfinite(weight) for weight in used.values()):
            raise AdapterError(f"a combination needs finite weights, not all 0, got {weights}.")
        deltas, modules = dict[str, LowRank](), dict[str, dict[str, Tensor]]()
        new = set(whole_modules(self.model))
        for place, piece in self._pieces.items():
            parts = [
                (used[part], held) for part in used if (held := piece.held_by(part)) is not None
            ]
            pairs = [(weight, held.low_rank()) for weight, held in parts if is_pair(held)]
            if pairs:
                deltas[place] = combined_pair(pairs)
            elif parts:
                copies = [(weight, dict(held.state_dict())) for weight, held in parts]
                base = dict(piece.base.state_dict())
                modules[place] = combined_values(copies, base, place=place, new=place in new)
        self.add_files(name, plain_files(self.model, deltas, modules))

    @contextmanager
    def rows(
        self, names: Sequence[str | None], *, repeat: int = 1, form: Form = "auto"
    ) -> Iterator[None]:
        """Let every row of a batch have an adapter of its own, for the length of a `with` block.

        Whatever is computed inside must have these rows in this order: a forward, or `generate`.

        Args:
            names: adapter of each row, None for the base.
            repeat: rows that `generate` makes of each: `num_beams` or `num_return_sequences`.
            form: `auto`, `masked` or `grouped`, how it is computed; see `batch_rows`.

        Yields:
            Nothing.

        Raises:
            AdapterError: an adapter is unknown, or changes experts; inside the block, where a
                batch has another number of rows.

        Example:
            >>> bank = AdapterBank(nn.ModuleDict({"proj": nn.Linear(8, 4)}))
            >>> with bank.rows([None, None]):
            ...     _ = bank.model["proj"](torch.ones(2, 8))
        """
        self._refuse_inside("rows")
        for name in {name for name in names if name is not None}:
            self._check(name)
        self._refuse_experts(names)
        self._rows = BatchRows(names, repeat=repeat, form=form)
        watching = self._rows.watch(self.model)
        self._choose()
        try:
            yield
        finally:
            watching.remove()
            self._rows = None
            self._choose()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model answer as the base does, for the length of a `with` block.

        Yields:
            Nothing.
        """
        for piece in self._pieces.values():
            piece.enabled = False
        try:
            yield
        finally:
            for piece in self._pieces.values():
                piece.enabled = True

    def merge_delta(self, name: str, module_name: str) -> Tensor | None:
        """Compute what an adapter adds to one module's weight.

        Args:
            name: of the adapter.
            module_name: dotted name, as in the model without adapters.

        Returns:
            (out, in) float32; None where the adapter adds nothing, or has the module whole.

        Raises:
            AdapterError: there is no such adapter.
        """
        self._check(name)
        piece = self._pieces.get(module_name)
        pair = piece.pair(name) if isinstance(piece, SharedLowRank) else None
        return None if pair is None else pair.delta()

    def save(
        self,
        name: str,
        folder: Path | str,
        *,
        base_model: str | None = None,
        revision: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write an adapter, a combination say, as a folder of a LoRA like any other.

        `merge`, `qlora-kit`, PEFT and others read it; a LoRA it is, whatever method it came from.

        Args:
            name: of the adapter.
            folder: created if needed.
            base_model: folder or hub id of the base; None: what the model says.
            revision: of a hub id.
            overwrite: replace an adapter that is already there.

        Raises:
            AdapterError: there is no such adapter.
            SourceError: an adapter is already there and overwrite is False.
        """
        self._check(name)
        found = {place: piece.held_by(name) for place, piece in self._pieces.items()}
        deltas = {place: held.low_rank() for place, held in found.items() if is_pair(held)}
        others = {
            place: held for place, held in found.items() if held is not None and not is_pair(held)
        }
        modules = {place: dict(held.state_dict()) for place, held in others.items()}
        files = plain_files(self.model, deltas, modules)
        if base_model is not None:
            files = replace(files, base=replace(files.base, path=base_model, revision=revision))
        write_adapter(folder, files, overwrite=overwrite)

    def detach_from_model(self) -> None:
        """Put the original modules, the same objects, and their trainability back."""
        for piece in self._pieces.values():
            piece.uninstall(self.model)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if hasattr(self.model, ATTACHED):
            delattr(self.model, ATTACHED)
        self._pieces, self._names, self._frozen, self.active = {}, [], [], None

    def _choose(self) -> None:
        """Tell all pieces who answers."""
        for piece in self._pieces.values():
            piece.choose(self._rows or self.active)

    def _check(self, name: str) -> None:
        if name not in self._names:
            raise AdapterError(f"there is no adapter {name!r} on the model. {self._known()}")

    def _known(self) -> str:
        return f"There are: {', '.join(self._names) or 'none'}."

    def _refuse_inside(self, what: str) -> None:
        if self._rows is not None:
            raise AdapterError(f"{what}() inside rows(): leave its `with` block first.")

    def _refuse_experts(self, names: Sequence[str | None]) -> None:
        for place, piece in self._pieces.items():
            if len(set(names)) > 1 and ".experts." in place and set(names) & set(piece.names):
                raise AdapterError(
                    f"rows(): {place} is an expert, which sees tokens of all rows in another "
                    "order. Answer with one adapter at a time (use), or merge."
                )

    def __repr__(self) -> str:
        """Say who is there and who answers, in one line."""
        return (
            f"AdapterBank({', '.join(self._names)}; {self.active or 'the base'} answers; "
            f"{len(self._pieces)} modules, {format_bytes(self.nbytes)})"
        )
