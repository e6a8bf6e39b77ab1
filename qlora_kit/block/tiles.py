"""A layer's work in pieces: tokens for what treats each alone, heads for attention.

Norms, projections and the feed-forward treat every token alone, so a batch of 300,000 tokens
can pass through them a tile at a time, and what is wide (gate and up, 28,672 columns of an 8B
model) exists for one tile only. Weights are decoded once for all tiles. What the tiles give is
the same arithmetic, row by row; only the sums over tokens that are LoRA's gradients come in
another order, tile by tile, added in float32.

Attention joins all tokens of a row, but no two groups of heads that read the same keys: its
kernels run on whole rows of some heads at a time, so that their results and workspace (cuDNN's
backward sums dQ in float32, and dK and dV once per query head) exist for these heads only.

Sizes follow from the configuration and from shapes, never from the memory that happens to be
free. A batch that fits into one tile runs as if there were none.
"""

from dataclasses import dataclass
from typing import Literal

from qlora_kit.block.description import Description
from qlora_kit.core.errors import ConfigError

AUTO_VALUES = 1 << 27
"""Of gate and up in a tile that `auto` chooses: 256 MiB in 16 bits."""

AUTO_LEAST, AUTO_MOST = 1024, 8192
"""Tokens of such a tile: below, decoding weights counts; above, nothing gets faster."""

AUTO_FROM_TILES = 4
"""Batches of no more than so many tiles stay whole under `auto`."""

ATTENTION_ROWS = 1 << 17
"""Rows of queries (tokens times heads) that attention gets at least: 1,024 blocks of a kernel."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one batch's tokens are divided.

    Example:
        >>> Tiles(10, 4).parts
        [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
        >>> Tiles(10, 16).several
        False
    """

    rows: int
    """M, tokens of the batch."""
    tokens: int
    """Of a tile."""

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.rows > self.tokens

    @property
    def parts(self) -> list[slice]:
        """The rows of each tile."""
        step = max(1, self.tokens)
        return [slice(a, min(a + step, self.rows)) for a in range(0, max(self.rows, 1), step)]

    def head_groups(self, heads: int, kv_heads: int) -> int:
        """Into how many groups attention divides its heads.

        Args:
            heads: of queries.
            kv_heads: of keys, and of values.

        Returns:
            The largest divisor of `kv_heads` that leaves a kernel `ATTENTION_ROWS`; 1 where the
            batch is one tile.

        Example:
            >>> Tiles(300_000, 4096).head_groups(32, 8), Tiles(20_000, 4096).head_groups(32, 8)
            (8, 4)
        """
        if not self.several:
            return 1
        fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
        return max(
            (n for n in fitting if self.rows * (heads // n) >= ATTENTION_ROWS),
            default=1,
        )


Tile = Literal["auto"] | int | None
"""As a configuration says it: `auto`, tokens of a tile, or None for all at once."""


def tile_tokens(tile: Tile) -> int | None:
    """Read the configuration's word.

    Args:
        tile: `auto`, tokens of a tile, or None.

    Returns:
        What `tiles_of` takes: 0 for `auto`.

    Raises:
        ConfigError: it is none of these.

    Example:
        >>> tile_tokens(4096), tile_tokens("auto"), tile_tokens(None)
        (4096, 0, None)
    """
    if tile is None or tile == "auto":
        return None if tile is None else 0
    if not isinstance(tile, int) or tile < 1:
        raise ConfigError(
            f"a tile is a number of tokens above 0, such as 4096, or auto, or null for all tokens "
            f"at once; got {tile!r}."
        )
    return tile


def tiles_of(d: Description, rows: int, tile: int | None) -> Tiles:
    """Divide a batch.

    Args:
        d: of the layer.
        rows: M, tokens of the batch.
        tile: tokens at a time; 0 for what the width of gate and up suggests; None for all.

    Returns:
        The tiles.
    """
    if tile is None:
        return Tiles(rows, rows)
    if tile:
        return Tiles(rows, tile)
    tokens = auto_tokens(d.gate_up.n)
    return Tiles(rows, tokens if rows > AUTO_FROM_TILES * tokens else rows)


def auto_tokens(width: int) -> int:
    """Tokens of a tile where the configuration leaves it open.

    Args:
        width: columns of gate and up together.

    Returns:
        The power of two that keeps them within `AUTO_VALUES`, between 1,024 and 8,192.

    Example:
        >>> auto_tokens(2 * 14336), auto_tokens(2 * 28672)
        (4096, 2048)
    """
    fitting = max(1, AUTO_VALUES // max(1, width))
    return min(AUTO_MOST, max(AUTO_LEAST, 1 << (fitting.bit_length() - 1)))
