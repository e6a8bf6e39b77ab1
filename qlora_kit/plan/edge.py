"""The edge of what fits, by few looks: where a line through two of them says it is."""

from collections.abc import Callable
from dataclasses import dataclass, field

_LINES = 10
"""Guesses by a line before halving."""


@dataclass(slots=True)
class Remembered:
    """A function of a whole number whose values are remembered.

    Example:
        >>> double = Remembered(lambda n: 2 * n)
        >>> double(3), double.known
        (6, {3: 6})
    """

    function: Callable[[int], int]
    known: dict[int, int] = field(default_factory=dict)

    def __call__(self, n: int) -> int:
        """The value at a number; the function is asked the first time only."""
        if n not in self.known:
            self.known[n] = self.function(n)
        return self.known[n]


def largest(room: Callable[[int], int], most: int, *, guess: int = 1) -> int:
    """The largest whole number for which there is room, where room falls about evenly.

    Args:
        room: of a number, at least one; negative where it does not fit.
        most: where to stop.
        guess: where to begin.

    Returns:
        A number with room whose successor has none, or `most`; 0 if not even one has room.

    Example:
        >>> largest(lambda n: 1000 - 7 * n, 10_000)
        142
    """
    low, high = 0, most + 1
    at = min(max(1, guess), most)
    while high - low > 1:
        if room(at) >= 0:
            low = at
        else:
            high = at
        at = _next(room, low, high, most)
    return low


def _next(room: Callable[[int], int], low: int, high: int, most: int) -> int:
    """Where to look next: where a line says, else in the middle."""
    known = getattr(room, "known", {})
    if low == 0:
        return max(1, high // 2)
    if high > most:
        other = max((n for n in known if n < low), default=0)
        if not other:
            return min(most, 2 * low)
        fall = (room(other) - room(low)) / (low - other)
        reach = low + int(room(low) / fall) if fall > 0 else most
        return min(most, max(low + 1, min(reach, 8 * low)))
    have, lack = room(low), -room(high)
    at = low + int((high - low) * have / (have + lack))
    if at <= low:  # the line says: here
        return low + 1
    tried = len([n for n in known if low // 2 < n < 2 * high])
    if tried > _LINES:  # not a line: halve
        return (low + high) // 2
    return min(at, high - 1)
