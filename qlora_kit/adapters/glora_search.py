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
the caller says which rows, and `train.glora.search_structures` takes the run's held-out ones.

Source: arXiv:2306.07967, section 3.4 and the authors' code; sizes as there.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.glora import GLoRALinear
from qlora_kit.adapters.glora_config import FORMS, GLoRA, Structure
from qlora_kit.core.errors import AdapterError, ConfigError

Candidate = tuple[Structure, ...]
"""One structure per linear, in the adapter's order."""

_TRIES = 200
"""Draws in a row that bring nothing new before a generation is left smaller."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found."""

    best: Found
    """Of all candidates."""
    modules: tuple[str, ...]
    """Names of the linears that `structures` belong to."""
    best_by_generation: tuple[float, ...]
    """Lowest loss so far, after every generation."""
    measured: int
    """Candidates."""

    def config(self, super_net: GLoRA) -> GLoRA:
        """The configuration of an adapter with the best structures.

        Args:
            super_net: the configuration that was searched in.

        Returns:
            The same, with a structure per linear.
        """
        pairs = zip(self.modules, self.best.structures, strict=True)
        return replace(super_net, super_net=False, structures={m: str(s) for m, s in pairs})


def super_net_pieces(adapter: AttachedAdapter) -> list[GLoRALinear]:
    """The linears of a super-net.

    Args:
        adapter: attached.

    Returns:
        In the model's order.

    Raises:
        AdapterError: it is no super-net.

    Example:
        >>> from torch import nn
        >>> from qlora_kit.adapters.inject import attach
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> [p.place for p in super_net_pieces(attach(model, GLoRA(super_net=True)))]
        ['layers.0']
    """
    pieces = [p for p in adapter.pieces if isinstance(p, GLoRALinear) and p.super_net]
    if not pieces:
        raise AdapterError(
            f"{adapter!r} is no GLoRA super-net. Attach GLoRA(super_net=True) and train it first."
        )
    return pieces


def draw(generator: random.Random) -> Structure:
    """Draw one of the 432 structures, each as likely.

    Args:
        generator: of the draw.

    Returns:
        The structure.

    Example:
        >>> str(draw(random.Random(0)))
        'none none lora scalar none'
    """
    return Structure(*(generator.choice(forms) for forms in FORMS.values()))


def draw_structures(pieces: Sequence[GLoRALinear], seed: int, update: int, batch: int) -> None:
    """Let every linear of a super-net use a structure drawn for one batch.

    Args:
        pieces: of the super-net; their `choice` is set.
        seed: the run's.
        update: number of the update.
        batch: number of the batch within it. All three decide alone: a resumed run draws
            what the whole run would have.
    """
    generator = random.Random(f"{seed}:{update}:{batch}")
    for piece in pieces:
        piece.choice = draw(generator).on(bias=piece.has_bias)


def use(pieces: Sequence[GLoRALinear], structures: Candidate) -> None:
    """Let every linear of a super-net use a given structure.

    Args:
        pieces: of the super-net; their `choice` is set.
        structures: one per piece.
    """
    for piece, structure in zip(pieces, structures, strict=True):
        piece.choice = structure


def search(
    adapter: AttachedAdapter,
    loss: Callable[[], float],
    *,
    limit: int,
    settings: SearchSettings | None = None,
) -> SearchResult:
    """Search a trained super-net.

    Args:
        adapter: the super-net, attached. Its structures are set while searching and whole
            again afterwards.
        loss: measures the model as it is on validation rows; lower is better.
        limit: most trained values of a candidate, the head's not counted.
        settings: sizes; None: the defaults.

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
    run = _Search(pieces, loss, limit, settings or SearchSettings())
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
    ) -> None:
        self.pieces, self.loss, self.limit, self.settings = pieces, loss, limit, settings
        self.random = random.Random(settings.seed)
        self.measured: dict[Candidate, Found] = {}

    def go(self) -> SearchResult:
        sizes, history = self.settings, list[float]()
        for generation in range(sizes.generations):
            if generation == 0:
                self._extend(self._any, sizes.population)
            else:
                parents = self._best(sizes.top)
                self._extend(partial(self._mutant, parents), sizes.mutations)
                self._extend(partial(self._child, parents), sizes.crossovers)
                target = sizes.population * (generation + 1)
                self._extend(self._any, target - len(self.measured))
            history.append(self._best(1)[0].loss)
        return SearchResult(
            best=self._best(1)[0],
            modules=tuple(piece.place for piece in self.pieces),
            best_by_generation=tuple(history),
            measured=len(self.measured),
        )

    def _best(self, count: int) -> list[Found]:
        """The lowest losses; of equal ones the fewest values, then the first measured."""
        return sorted(self.measured.values(), key=lambda f: (f.loss, f.parameters))[:count]

    def _extend(self, make: Callable[[], Candidate], count: int) -> None:
        """Measure so many new candidates, or fewer where there are no more."""
        misses = 0
        while count > 0 and misses < _TRIES:
            candidate = self._fit(make())
            if candidate in self.measured:
                misses += 1
                continue
            use(self.pieces, candidate)
            loss = float(self.loss())
            loss = math.inf if math.isnan(loss) else loss  # it would upset the order
            self.measured[candidate] = Found(candidate, loss, self._count(candidate))
            count, misses = count - 1, 0

    def _any(self) -> Candidate:
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
        return tuple(structure.on(bias=piece.has_bias) for structure, piece in pairs)

    def _fit(self, candidate: Candidate) -> Candidate:
        """Set random supports to none until the candidate is under the limit."""
        fitted = list(candidate)
        total = self._count(candidate)
        places = [
            (i, field.name)
            for i, structure in enumerate(fitted)
            for field in fields(structure)
            if getattr(structure, field.name) != "none"
        ]
        self.random.shuffle(places)
        while total > self.limit:
            i, support = places.pop()
            total -= self._count_one(i, fitted[i])
            fitted[i] = replace(fitted[i], **{support: "none"})
            total += self._count_one(i, fitted[i])
        return tuple(fitted)

    def _count(self, candidate: Candidate) -> int:
        return sum(self._count_one(i, structure) for i, structure in enumerate(candidate))

    def _count_one(self, i: int, structure: Structure) -> int:
        piece = self.pieces[i]
        return structure.count(
            piece.out_features, piece.in_features, rank=piece.rank, bias=piece.has_bias
        )
