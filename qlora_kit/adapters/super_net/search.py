"""Looking for the best structures in a trained GLoRA super-net, under a limit of parameters.

An evolutionary search over one structure per linear (432 each):

1. The population: `population` candidates drawn at random.
2. Each new candidate is measured; its fitness is a loss on *validation* rows, lower is better.
3. The `top` best of all so far are parents. The next population is `mutations` of random
   parents (every support of every linear is drawn anew with probability p), `crossovers` of
   two random parents (every support comes from either), and random candidates for the rest.
4. After `generations` the best of all is the answer.

No candidate is measured twice, and none has more trained values than the limit: one that has
is brought under it by setting supports, drawn at random, to `none` until it fits. Everything
is decided by a seed: a search repeats.

Searching on training rows would choose the largest structures, and on test rows is cheating:
the caller says which rows; `qlora-kit search` takes the run's held-out ones.

Source: arXiv:2306.07967, section 3.4 and the authors' code; sizes as there.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.glora.config import FORMS, GLoRA, Structure
from qlora_kit.adapters.glora.layer import GLoRALinear
from qlora_kit.adapters.super_net.structures import (
    Candidate,
    count_values,
    draw,
    super_net_pieces,
    use,
)
from qlora_kit.core.errors import ConfigError

_TRIES = 200
"""Draws in a row that bring nothing new before a generation is left smaller."""
_NEAR = 200
"""Random candidates of which the one with the most values below a size stands for the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """Sizes of the search; the defaults are the authors'.

    Example:
        >>> SearchSettings(population=8, mutations=3, crossovers=3).refill
        2
    """

    population: int = 50
    """Candidates per generation."""
    top: int = 10
    """Best candidates so far that are parents."""
    mutations: int = 25
    """Of a population, made of one parent each."""
    crossovers: int = 25
    """Of a population, made of two parents each."""
    probability: float = 0.2
    """That a support is drawn anew in a mutation."""
    generations: int = 20
    """Populations that are measured."""
    seed: int = 0
    """Of every draw."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no search.

        Raises:
            ConfigError: a field is out of range.
        """
        if min(self.population, self.top, self.generations) < 1:
            raise ConfigError("a search needs population, top and generations of at least 1.")
        if min(self.mutations, self.crossovers, self.refill) < 0:
            raise ConfigError(
                f"mutations and crossovers make up a population of {self.population} at most: got "
                f"{self.mutations} + {self.crossovers}."
            )
        if not 0.0 < self.probability <= 1.0:
            raise ConfigError(f"probability must be above 0 and up to 1, got {self.probability}.")

    @property
    def refill(self) -> int:
        """Candidates of a population that are drawn at random."""
        return self.population - self.mutations - self.crossovers


@dataclass(frozen=True, slots=True)
class Found:
    """A measured candidate."""

    structures: Candidate
    """One per linear."""
    loss: float
    """On validation rows."""
    parameters: int
    """Trained values."""
    generation: int
    """In which it was measured, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found."""

    best: Found
    """Of all candidates."""
    modules: tuple[str, ...]
    """Names of the linears that `structures` belong to."""
    best_by_generation: tuple[float, ...]
    """Lowest loss so far, after every generation."""
    candidates: tuple[Found, ...]
    """All that were measured, in that order."""

    @property
    def measured(self) -> int:
        """Number of candidates."""
        return len(self.candidates)

    def ranking(self, count: int) -> list[Found]:
        """The lowest losses; of equal ones the fewest values, then the first measured.

        Args:
            count: how many.

        Returns:
            At most so many, best first.
        """
        return ranked(self.candidates)[:count]

    def config(self, super_net: GLoRA) -> GLoRA:
        """The configuration of an adapter with the best structures.

        Args:
            super_net: the configuration that was searched in.

        Returns:
            The same, with a structure per linear.
        """
        pairs = zip(self.modules, self.best.structures, strict=True)
        return replace(super_net, super_net=False, structures={m: str(s) for m, s in pairs})


def ranked(candidates: Iterable[Found]) -> list[Found]:
    """Sort measured candidates, the best first.

    Args:
        candidates: in the order in which they were measured.

    Returns:
        By loss; of equal ones the fewest values, then the first measured.

    Example:
        >>> [f.parameters for f in ranked([Found((), 2.0, 1, 0), Found((), 1.0, 9, 0)])]
        [9, 1]
    """
    return sorted(candidates, key=lambda found: (found.loss, found.parameters))


def random_structures(
    adapter: AttachedAdapter, *, size: int, count: int, seed: int
) -> list[Candidate]:
    """Draw structures of a size, to be compared with those that a search found.

    Args:
        adapter: a super-net, attached.
        size: trained values at most; of many random draws the largest is taken, which is near.
        count: how many.
        seed: of the draws; they are others than those of a search with the same seed.

    Returns:
        Candidates that nothing was measured for.

    Raises:
        AdapterError: the adapter is no super-net.

    Example:
        >>> from torch import nn
        >>> from qlora_kit.adapters.inject import attach
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> adapter = attach(model, GLoRA(rank=2, super_net=True))
        >>> drawn = random_structures(adapter, size=30, count=2, seed=0)
        >>> [count_values(super_net_pieces(adapter), candidate) for candidate in drawn]
        [30, 30]
    """
    pieces = super_net_pieces(adapter)
    run = _Search(pieces, lambda: 0.0, size, SearchSettings())
    run.random = random.Random(f"control:{seed}")
    return [
        max((run.random_candidate() for _ in range(_NEAR)), key=partial(count_values, pieces))
        for _ in range(count)
    ]


def search(
    adapter: AttachedAdapter,
    loss: Callable[[], float],
    *,
    limit: int,
    settings: SearchSettings | None = None,
    watch: Callable[[Found], None] | None = None,
) -> SearchResult:
    """Search a trained super-net.

    Args:
        adapter: the super-net, attached. Its structures are set while searching and whole
            again afterwards.
        loss: measures the model as it is on validation rows; lower is better.
        limit: most trained values of a candidate, the head's not counted.
        settings: sizes; None: the defaults.
        watch: called with every candidate once it is measured.

    Returns:
        The best candidate, and how the search went.

    Raises:
        AdapterError: the adapter is no super-net.
        ConfigError: the limit is below 0.

    Example:
        >>> from torch import nn
        >>> from qlora_kit.adapters.inject import attach
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> adapter = attach(model, GLoRA(rank=2, super_net=True))
        >>> piece = adapter.pieces[0]
        >>> small = SearchSettings(population=6, mutations=2, crossovers=2, generations=2)
        >>> found = search(adapter, lambda: float(piece.choice.a != "scalar"), limit=30,
        ...     settings=small)
        >>> found.best.structures[0].a, found.best.parameters <= 30
        ('scalar', True)
    """
    pieces = super_net_pieces(adapter)
    if limit < 0:
        raise ConfigError(f"the limit of trained values must be at least 0, got {limit}.")
    whole = tuple(piece.structure for piece in pieces)
    run = _Search(pieces, loss, limit, settings or SearchSettings(), watch)
    try:
        return run.go()
    finally:
        use(pieces, whole)


class _Search:
    """The state of one search."""

    def __init__(
        self,
        pieces: Sequence[GLoRALinear],
        loss: Callable[[], float],
        limit: int,
        settings: SearchSettings,
        watch: Callable[[Found], None] | None = None,
    ) -> None:
        self.pieces, self.loss, self.limit, self.settings = pieces, loss, limit, settings
        self.watch = watch or (lambda found: None)
        self.generation = 0
        self.random = random.Random(settings.seed)
        self.measured: dict[Candidate, Found] = {}

    def go(self) -> SearchResult:
        sizes, history = self.settings, list[float]()
        for generation in range(sizes.generations):
            self.generation = generation
            if generation == 0:
                self._extend(self.random_candidate, sizes.population)
            else:
                parents = self._best(sizes.top)
                self._extend(partial(self._mutant, parents), sizes.mutations)
                self._extend(partial(self._child, parents), sizes.crossovers)
                target = sizes.population * (generation + 1)
                self._extend(self.random_candidate, target - len(self.measured))
            history.append(self._best(1)[0].loss)
        return SearchResult(
            best=self._best(1)[0],
            modules=tuple(piece.place for piece in self.pieces),
            best_by_generation=tuple(history),
            candidates=tuple(self.measured.values()),
        )

    def _best(self, count: int) -> list[Found]:
        return ranked(self.measured.values())[:count]

    def _extend(self, make: Callable[[], Candidate], count: int) -> None:
        """Measure so many new candidates, or fewer where there are no more."""
        misses = 0
        while count > 0 and misses < _TRIES:
            candidate = make()
            if candidate in self.measured:
                misses += 1
                continue
            use(self.pieces, candidate)
            loss = float(self.loss())
            loss = math.inf if math.isnan(loss) else loss  # it would upset the order
            found = Found(candidate, loss, count_values(self.pieces, candidate), self.generation)
            self.measured[candidate] = found
            self.watch(found)
            count, misses = count - 1, 0

    def random_candidate(self) -> Candidate:
        """Any, brought under the limit."""
        return self._settled([draw(self.random) for _ in self.pieces])

    def _mutant(self, parents: Sequence[Found]) -> Candidate:
        parent = self.random.choice(parents).structures
        p = self.settings.probability
        changed = []
        for structure in parent:
            other = draw(self.random)
            forms = [
                getattr(other if self.random.random() < p else structure, support)
                for support in FORMS
            ]
            changed.append(Structure(*forms))
        return self._settled(changed)

    def _child(self, parents: Sequence[Found]) -> Candidate:
        one, two = (self.random.choice(parents).structures for _ in range(2))
        mixed = [
            Structure(*(getattr(self.random.choice(pair), support) for support in FORMS))
            for pair in zip(one, two, strict=True)
        ]
        return self._settled(mixed)

    def _settled(self, structures: Sequence[Structure]) -> Candidate:
        pairs = zip(structures, self.pieces, strict=True)
        return self._fit([structure.on(bias=piece.has_bias) for structure, piece in pairs])

    def _fit(self, candidate: Sequence[Structure]) -> Candidate:
        """Set random supports to none until the candidate is under the limit."""
        fitted = list(candidate)
        total = count_values(self.pieces, tuple(candidate))
        places = [
            (i, field.name)
            for i, structure in enumerate(fitted)
            for field in fields(structure)
            if getattr(structure, field.name) != "none"
        ]
        self.random.shuffle(places)
        while total > self.limit:
            i, support = places.pop()
            total -= count_values(self.pieces[i : i + 1], (fitted[i],))
            fitted[i] = replace(fitted[i], **{support: "none"})
            total += count_values(self.pieces[i : i + 1], (fitted[i],))
        return tuple(fitted)
