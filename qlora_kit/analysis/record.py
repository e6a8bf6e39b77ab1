"""Everything `qlora-kit inspect` finds out, as one JSON object, from which the page is made.

    {"format", "versions", "commit", "options", "adapters", "similarity"}

`adapters` has one entry per adapter: its spectra and, where the base can be read, its
amplification table. `similarity` has one entry per pair: φ averaged over layers in full,
and of every module φ at powers of two, which is what a map over layers shows and a
fiftieth of the size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.adapters.formats.peft import AdapterFiles, read_adapter
from qlora_kit.adapters.registry import method_name
from qlora_kit.analysis.amplification import Amplification, amplification_table
from qlora_kit.analysis.directions import Side, decompose, layer_and_kind
from qlora_kit.analysis.similarity import Similarity, compare_adapters, mean_grids
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.errors import AdapterError
from qlora_kit.core.patterns import matches_any
from qlora_kit.train.record import package_versions, source_commit

FORMAT = 1
"""Of the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to look at.

    Example:
        >>> Options().sides
        ('A', 'B')
    """

    base: str | None = None
    """Folder, `.gguf` file or hub id of the weights; None: no amplification."""
    revision: str | None = None
    """Of a hub id."""
    into: str = "quantized"
    """W as training decoded it, or `original`: the 16-bit weights."""
    modules: tuple[str, ...] = ()
    """Patterns of names; empty for all."""
    sides: tuple[Side, ...] = ("A", "B")
    """Directions to compare."""
    device: str = "cpu"
    """Where to compute on weights."""
    seed: int = 0
    """Of the random controls."""


def inspect_adapters(folders: Sequence[str | Path], options: Options) -> dict[str, Any]:
    """Analyse adapters one by one and in pairs.

    Args:
        folders: adapters in our format or PEFT's.
        options: what to look at.

    Returns:
        The record; plain values.

    Raises:
        SourceError: an adapter or the base cannot be found.
        FormatError: a file is malformed.
        AdapterError: an adapter has no low-rank change, or does not fit the base or another.

    Example:
        >>> inspect_adapters(["no/such/adapter"], Options())
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: no/such/adapter is not an adapter folder: ...
    """
    names = [str(folder) for folder in folders]
    found = [read_adapter(folder) for folder in folders]
    for name, files in zip(names, found, strict=True):
        if not any(_wanted(module, options) for module in files.deltas):
            raise AdapterError(_nothing_to_see(name, files, options))
    pairs = combinations(range(len(found)), 2)
    return {
        "format": FORMAT,
        "versions": package_versions(),
        "commit": source_commit(),
        "options": {"into": options.into, "seed": options.seed, "modules": list(options.modules)},
        "adapters": [
            _adapter(name, files, options) for name, files in zip(names, found, strict=True)
        ],
        "similarity": [_pair(found, names, one, two, options) for one, two in pairs],
    }


def _nothing_to_see(name: str, files: AdapterFiles, options: Options) -> str:
    """Why an adapter has no spectrum."""
    if options.modules and files.deltas:
        return f"{name} changes no module by low rank that matches {', '.join(options.modules)}."
    return (
        f"{name} changes no module by low rank: its method is {method_name(files.config)}, and "
        "`inspect` reads lora, rslora, lora_fa, dora and adalora."
    )


def _wanted(module: str, options: Options) -> bool:
    return not options.modules or matches_any(module, options.modules)


def _adapter(name: str, files: AdapterFiles, options: Options) -> dict[str, Any]:
    """Spectra of one adapter and, with a base, its amplification table."""
    table = None
    if options.base is not None:
        source = open_source(options.base, revision=options.revision)
        lines = amplification_table(
            source,
            files,
            into=options.into,
            modules=options.modules,
            device=torch.device(options.device),
            seed=options.seed,
        )
        table = [_line(line) for line in lines]
    return {
        "path": name,
        "method": method_name(files.config),
        "rank": getattr(files.config, "rank", None),
        "base": options.base if options.base is not None else files.base.path,
        "modules": [_spectrum(m, files) for m in files.deltas if _wanted(m, options)],
        "amplification": table,
    }


def _spectrum(module: str, files: AdapterFiles) -> dict[str, Any]:
    found = decompose(files.deltas[module])
    layer, kind = layer_and_kind(module)
    return {
        "module": module,
        "layer": layer,
        "kind": kind,
        "shape": [found.left.shape[0], found.right.shape[0]],
        "rank": found.rank,
        "norm": found.norm,
        "stable_rank": found.stable_rank,
        "values": _plain(found.values),
    }


def _line(line: Amplification) -> dict[str, Any]:
    layer, kind = layer_and_kind(line.module)
    at = powers(line.rank)
    return {
        "module": line.module,
        "layer": layer,
        "kind": kind,
        "shape": list(line.shape),
        "rank": line.rank,
        "delta_norm": line.delta_norm,
        "weight_norm": line.weight_norm,
        "directions": at,
        "by_delta": [line.by_delta[r - 1] for r in at],
        "by_weight": [line.by_weight[r - 1] for r in at],
        "by_random": [line.by_random[r - 1] for r in at],
        "expected_random": line.expected_random,
        "factors": [line.factors[r - 1] for r in at],
        "factor": line.factor,
    }


def _pair(
    found: list[AdapterFiles], names: list[str], one: int, two: int, options: Options
) -> dict[str, Any]:
    similarities = compare_adapters(
        found[one], found[two], sides=options.sides, modules=options.modules, seed=options.seed
    )
    return {
        "first": names[one],
        "second": names[two],
        "means": [
            {
                "side": side,
                "kind": kind,
                "layers": count,
                "phi": _plain(grid),
                "random": _plain(control),
            }
            for (side, kind), (grid, control, count) in mean_grids(similarities).items()
        ],
        "modules": [_module(one) for one in similarities],
    }


def powers(count: int) -> list[int]:
    """Powers of two up to a number, and the number.

    Args:
        count: at least 1, or 0 for none.

    Returns:
        Ascending.

    Example:
        >>> powers(6), powers(8), powers(0)
        ([1, 2, 4, 6], [1, 2, 4, 8], [])
    """
    below = [1 << n for n in range(count.bit_length()) if 1 << n < count]
    return [*below, count] if count else []


def _module(one: Similarity) -> dict[str, Any]:
    """φ of one module at powers of two, with what chance gives on average."""
    layer, kind = layer_and_kind(one.module)
    i, j = (powers(size) for size in one.grid.shape)
    return {
        "module": one.module,
        "layer": layer,
        "kind": kind,
        "side": one.side,
        "dimension": one.dimension,
        "i": i,
        "j": j,
        "phi": [[round(float(one.grid[a - 1, b - 1]), 4) for b in j] for a in i],
        "expected": [[round(one.expected(a, b), 4) for b in j] for a in i],
    }


def _plain(values: Tensor) -> Any:
    """Numbers of a tensor with the five digits that say something."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [float(f"{value:.5g}") for value in values.tolist()]
