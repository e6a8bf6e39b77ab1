"""How a product of `hopper` is cut into blocks: shapes of block, and the model that chooses.

Either blocks of a cluster share each tile's contraction and add up through their shared memory,
or clusters take stretches of equal length of all tiles, one behind the other, and those that are
cut are added up in memory. For more than 32 tokens clusters first make whole tiles, as long as
there is one for each.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

DEPTH = 64
"""Of the contraction, in a step."""
_TABLE_BYTES = 256 * 32 * 8
_RESULT_BYTES = 10240


@dataclass(frozen=True, slots=True)
class Shape:
    """What a block does, as in kernels/nf4_linear/hopper/shape.cuh."""

    tokens: int
    """Rows of the activations it takes."""
    stages: int
    """In flight."""
    groups: int
    """Warpgroups that decode."""
    tiles: int
    """Of 64 columns of the result, for each of them."""
    step: float
    """Measured time of 64 of the contraction, relative to a block of eight tokens."""

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return 128 * self.tiles

    @property
    def sharing(self) -> int:
        """Blocks that bring in their common activations together."""
        return 2 if self.tiles == 1 else 1

    @property
    def threads(self) -> int:
        """Those that decode, and the warpgroup that brings tiles."""
        return 128 * (self.groups + 1)

    @property
    def shared(self) -> int:
        """Bytes of shared memory: table, stages, map of scales, barriers; sums or results."""
        stage = self.tokens * DEPTH * 2 + self.columns * (DEPTH // 2 + 4)
        stage = -(-stage // 1024) * 1024
        sums = self.groups // 2 * self.tokens * (self.columns + 4) * 4 if self.own_sums else 0
        sums += _RESULT_BYTES if self.groups == 2 else 0
        return _TABLE_BYTES + self.stages * stage + 1024 + sums + 16 * self.stages + 16

    @property
    def own_sums(self) -> bool:
        """Whether sums have shared memory of their own, and do not lie over the stages."""
        return self.tokens <= 16

    @property
    def whole(self) -> bool:
        """Whether clusters make whole tiles before they take stretches of those that are left."""
        return self.groups == 2

    @property
    def small_tokens(self) -> int:
        """Rows of a tile of the small product."""
        return 16 if self.groups == 4 else 32

    @property
    def sums(self) -> int:
        """Values that a block leaves for others: the sums of its tile, of every part."""
        return self.tokens * self.columns * self.groups // 2

    def packed_box(self, transposed: bool) -> tuple[tuple[int, int], int]:
        """Rows and bytes of a stage's weights, and how the copy engine permutes them."""
        if transposed:
            return (DEPTH, self.columns // 2), self.columns // 2
        return (self.columns, DEPTH // 2), 32

    def tiles_of(self, m: int, columns: int) -> int:
        """Blocks, or pairs of blocks that share, that cover a result."""
        return -(-m // self.tokens) * -(-columns // (self.columns * self.sharing))


class Cut(NamedTuple):
    """How a product is cut into blocks."""

    shape: Shape
    split: int
    """Blocks, or pairs, of a cluster that share the contraction."""
    clusters: int
    """How many take stretches of all tiles' contraction; as many as there are tiles: one each."""


# Steps are fitted, with the constants below, to times of 100 products, cut in 2,100 ways, on one
# H100; what they chose was 0.5% slower on average than the best that was measured.
SHAPES = (
    Shape(8, 12, 4, 2, 1.0),
    Shape(16, 11, 4, 2, 1.09),
    Shape(32, 10, 4, 2, 1.24),
    Shape(64, 8, 2, 2, 1.26),
    Shape(64, 10, 2, 1, 0.66),
    Shape(128, 6, 2, 2, 1.80),
    Shape(128, 7, 2, 1, 0.925),
    Shape(256, 4, 2, 1, 1.355),
)


SMALL_RANKS = 16
"""Of a tile of the small product."""
SMALL_PARTS = 8
"""Of all its tiles, where blocks share them."""

H100 = 132, 66, 39, 30, 22, 17, 15, 15
"""Clusters of one block, two, ... that one held at once."""


@dataclass(frozen=True, slots=True)
class _Costs:
    """What a cluster costs besides its steps, in steps of eight tokens: 0.54 µs each."""

    fixed: float = 12.0
    """To begin and to end."""
    split_tile: float = 0.77
    """To add up through shared memory, if blocks of it share the contraction, per 16 tokens x
    256 columns of a block."""
    piece: float = 2.34
    """To end one tile and begin another."""
    piece_few: float = 3.6
    """The same of up to 32 tokens, whose sums meet in shared memory."""
    piece_tile: float = 0.74
    meeting: float = 1.07
    """To add up in memory, if clusters share a tile."""
    meeting_tile: float = 0.38
    """And for each of them, per 16 tokens x 256 columns."""
    apart: float = 1.034
    """Of a step of 128 tokens and more, if clusters are not at the same place of the contraction:
    what one has brought in another no longer finds in the cache."""
    small: float = 13.5
    """To begin and to end the small product."""
    small_step: float = 3.8
    """For four of a warp's steps of it,"""
    small_step_far: float = 8.0e-8
    """more for each value that all read,"""
    small_step_long: float = 2.1e-4
    """and for each of its contraction: loads wait for longer."""
    outside: float = 5.9
    """If another kernel makes it,"""
    outside_each: float = 2.2e-6
    """and for each value that it reads."""


_COSTS = _Costs()
_MOST_COUNTED = 1 << 32
"""The kernel finds a cluster's stretch by a product of all tiles' quads and the clusters."""
_MAKERS = 0, 4, 8, 16
"""Blocks that make the small product; none: another kernel does."""


class _Times(NamedTuple):
    """Of a product, in steps of eight tokens."""

    whole: float
    first: float
    """Until a tile wants the small product."""


def _times(cut: Cut, tiles: int, quads: int, most: int) -> _Times:
    """With so many clusters at once."""
    shape, split, count = cut
    tile = shape.tokens / 16 * shape.columns / 256
    own = _COSTS.fixed
    if split > 1:
        own += _COSTS.split_tile * tile
    if count == tiles:
        rounds = -(-tiles // max(1, most))
        steps = 4 * -(-quads // split) * shape.step
        return _Times(rounds * (steps + own), _COSTS.fixed + steps)
    each, left = divmod(tiles, count) if shape.whole else (0, tiles)
    if each and 0 < left * quads < count:  # a quad for everybody
        each, left = each - 1, left + count
    bounds = [left * quads * i // count for i in range(count + 1)]
    pieces = each + max(
        -(-end // quads) - begin // quads if end > begin else 0
        for begin, end in itertools.pairwise(bounds)
    )
    piece = _COSTS.piece if shape.whole else _COSTS.piece_few
    own += (pieces - 1) * (piece + _COSTS.piece_tile * tile)
    steps = 4 * each * quads * shape.step
    apart = 1.0
    if tiles % count:
        own += _COSTS.meeting + _COSTS.meeting_tile * tile * -(-count // left)
        apart = _COSTS.apart if shape.tokens >= 128 else 1.0
    steps += 4 * -(-left * quads // count) * shape.step * apart
    return _Times(steps + own, _COSTS.fixed + min(steps, 4 * quads * shape.step))


def _stretches(tiles: int, quads: int, most: int) -> set[int]:
    """How many clusters may take stretches: all there are, or so many that few tiles are cut."""
    counts = {min(most, tiles * quads)}
    if tiles < most:
        counts.add(tiles * (most // tiles))
    else:
        counts.add(-(-tiles // -(-tiles // most)))
    return {count for count in counts if count <= tiles * quads}


def sums_bytes(cut: Cut, tiles: int) -> int:
    """What clusters that share tiles leave in memory for one another.

    Args:
        cut: how a product is cut.
        tiles: of its result.

    Returns:
        Bytes; 0 where no tile is shared.

    Example:
        >>> sums_bytes(Cut(SHAPES[-1], 1, 66), 224), sums_bytes(Cut(SHAPES[-1], 1, 64), 64)
        (34603008, 0)
    """
    shape, _, clusters = cut
    return 0 if tiles % clusters == 0 else 2 * clusters * shape.sharing * shape.sums * 4


def _small_time(m: int, rank: int, contraction: int, shape: Shape, blocks: int) -> float:
    """In which so many blocks make the small product."""
    tiles = -(-m // shape.small_tokens) * -(-rank // SMALL_RANKS)
    parts = max(1, min(blocks, SMALL_PARTS) // tiles)
    steps = -(-contraction // (parts * shape.threads))  # of 32, by each warp
    rounds = -(-tiles * parts // blocks)
    each = (
        _COSTS.small_step
        + _COSTS.small_step_far * m * contraction
        + _COSTS.small_step_long * contraction
    )
    return _COSTS.small + rounds * -(-steps // 4) * each


@lru_cache(maxsize=4096)
def tiling(
    m: int, columns: int, contraction: int, clusters: tuple[int, ...], rank: int = 0
) -> tuple[Cut, int]:
    """Choose how a product is cut into blocks.

    The least time by a simple model: a cluster costs its steps along the contraction and what
    starting, ending and adding up cost; tiles that do not fit at once come in rounds.

    Args:
        m: rows of the activations.
        columns: of the result.
        contraction: length of the sums.
        clusters: how many clusters of 1, 2, ... blocks the GPU holds at once.
        rank: of the small product, if the launch may make it; or 0.

    Returns:
        The shape of a block, how many share a contraction, and how many clusters there are;
        and how many clusters beside those make the small product, if it does.

    Example:
        >>> cut, makers = tiling(16, 4096, 14336, (132, 66, 44, 32, 26, 22, 18, 16), 16)
        >>> cut.shape.tokens, cut.split, cut.clusters, makers
        (16, 1, 128, 4)
    """
    quads = -(-contraction // (4 * DEPTH))
    tokens = next((shape.tokens for shape in SHAPES if shape.tokens >= m), SHAPES[-1].tokens)
    costs: dict[tuple[Cut, int], float] = {}
    for shape in SHAPES:
        if shape.tokens != tokens and not 32 <= shape.tokens <= (tokens if tokens != 32 else 64):
            continue
        tiles = shape.tiles_of(m, columns)
        for blocks in _MAKERS if rank else (0,):
            makers = -(-blocks // shape.sharing)
            most = clusters[shape.sharing - 1] - makers
            counts = _stretches(tiles, quads, most) if most > 0 else ()
            cuts = [(Cut(shape, 1, count), makers) for count in counts]
            for split in range(1, min(len(clusters) // shape.sharing, quads) + 1):
                makers = -(-blocks // (split * shape.sharing))
                cuts.append((Cut(shape, split, tiles), makers))
            for cut, makers in cuts:
                if tiles * quads * cut.clusters >= _MOST_COUNTED:
                    continue
                size = cut.split * shape.sharing
                cost, first = _times(cut, tiles, quads, clusters[size - 1] - makers)
                if makers:
                    small = _small_time(m, rank, contraction, shape, makers * size)
                    cost += max(0.0, small - first)
                elif rank:
                    cost += _COSTS.outside + _COSTS.outside_each * m * contraction
                costs[cut, makers] = cost
    return min(costs, key=costs.__getitem__)
