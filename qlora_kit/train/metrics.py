"""What counts as a right answer: plain functions on strings and class numbers."""

import json
import math
from collections.abc import Sequence
from typing import Any


def perplexity(loss: float) -> float:
    """Turn a mean loss in nats per token into a perplexity.

    Args:
        loss: mean cross-entropy.

    Returns:
        exp(loss); infinity where that overflows.

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def same_answer(answer: str, reference: str) -> bool:
    """Compare two answers as a reader would.

    Both JSON: equal as values, so that spacing and key order do not matter.
    Otherwise: equal up to white space.

    Args:
        answer: what the model wrote.
        reference: what it should have written.

    Returns:
        Whether they say the same.

    Example:
        >>> same_answer('{"a": 1, "b": true}', '{"b":true,"a":1}')
        True
        >>> same_answer("  turn  on ", "turn on"), same_answer("1", "true")
        (True, False)
    """
    left, right = _parse(answer), _parse(reference)
    if left is not _NOT_JSON and right is not _NOT_JSON:
        return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)
    return " ".join(answer.split()) == " ".join(reference.split())


_NOT_JSON = object()


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return _NOT_JSON


def is_json_object(text: str) -> bool:
    """Tell whether a text is a JSON object or list.

    Args:
        text: an answer.

    Returns:
        True for objects and lists, False for plain words, numbers and the rest.

    Example:
        >>> is_json_object('{"a": 1}'), is_json_object("12")
        (True, False)
    """
    return isinstance(_parse(text), dict | list)


def accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of right predictions.

    Args:
        predicted: class numbers.
        wanted: class numbers, as many.

    Returns:
        Between 0 and 1; 0 for no rows.

    Example:
        >>> accuracy([0, 1, 1, 0], [0, 1, 0, 0])
        0.75
    """
    right = sum(p == w for p, w in zip(predicted, wanted, strict=True))
    return right / len(wanted) if wanted else 0.0


def macro_f1(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """F1 of each class that occurs or is predicted, averaged with equal weights.

    Args:
        predicted: class numbers.
        wanted: class numbers, as many.

    Returns:
        Between 0 and 1; 0 for no rows.

    Example:
        >>> macro_f1([0, 1, 1], [0, 1, 1])
        1.0
        >>> round(macro_f1([0, 0, 0, 0], [0, 0, 0, 1]), 4)
        0.4286
    """
    classes = sorted({*predicted, *wanted})
    pairs = list(zip(predicted, wanted, strict=True))
    scores = []
    for c in classes:
        true = sum(p == c and w == c for p, w in pairs)
        named = sum((p == c) + (w == c) for p, w in pairs)
        scores.append(2 * true / named)
    return sum(scores) / len(scores) if scores else 0.0
