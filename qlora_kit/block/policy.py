"""What a layer keeps for its backward pass and what it computes again: one word per layer.

    save                    nothing is computed again
    recompute_elementwise   norms and activations are; matrix products and attention are not
    recompute_mlp           the feed-forward is, but for its last product
    recompute_all           the layer is, but for that product
    offload_attention       as recompute_mlp, and what is kept waits in pinned host memory
    offload                 as recompute_all, likewise

A model's policy is one of these words, or a mixture such as `recompute_all:24,save:8`: 24
layers of the first kind, then eight of the second. Layers that keep less had better come first:
their working set is needed when what the others kept is gone. Gradients do not depend on it, bit
for bit, as far as attention's backward repeats its bits.
"""

from qlora_kit.core.errors import ConfigError

POLICIES = (
    "save",
    "recompute_elementwise",
    "recompute_mlp",
    "recompute_all",
    "offload_attention",
    "offload",
)
"""From the most memory on the GPU to the least."""


def recomputed(policy: str) -> str:
    """What a policy computes again.

    Args:
        policy: one of `POLICIES`.

    Returns:
        `elementwise` (or less), `mlp` or `all`.

    Example:
        >>> recomputed("offload_attention")
        'mlp'
    """
    if policy in ("recompute_all", "offload"):
        return "all"
    return "mlp" if policy in ("recompute_mlp", "offload_attention") else "elementwise"


def waits_on_host(policy: str) -> bool:
    """Whether what a policy keeps waits in host memory.

    Args:
        policy: one of `POLICIES`.

    Returns:
        True for the two that begin with `offload`.
    """
    return policy.startswith("offload")


def parse_policy(text: str, layers: int) -> tuple[str, ...]:
    """Read a policy.

    Args:
        text: one of `POLICIES`, or several with numbers of layers; the last number may be
            left out and stands for the rest.
        layers: how many the model has.

    Returns:
        One word per layer.

    Raises:
        ConfigError: a word is unknown or the numbers do not add up.

    Example:
        >>> parse_policy("save:1,recompute_all", 3)
        ('save', 'recompute_all', 'recompute_all')
    """
    words: list[str] = []
    pieces = [piece.strip() for piece in text.split(",")]
    for index, piece in enumerate(pieces):
        word, _, number = piece.partition(":")
        if word not in POLICIES:
            raise ConfigError(
                f"unknown activation policy {word!r}; known: {', '.join(POLICIES)}, or a mixture "
                f"such as recompute_all:{max(layers - 8, 1)},save:8."
            )
        if not number and index == len(pieces) - 1:
            number = str(max(layers - len(words), 0))
        if not number.isdecimal():
            raise ConfigError(
                f"activation policy {text!r} needs a number of layers after {word!r}, as in "
                f"{word}:8."
            )
        words += [word] * int(number)
    if len(words) != layers:
        raise ConfigError(
            f"activation policy {text!r} is for {len(words)} layers, and the model has {layers}."
        )
    return tuple(words)
