"""GLoRA's settings: which of the five supports a linear trains, and in which form; free of torch.

    W* = W + W⊙A + B        b* = b + b⊙D + E + W·C

Each support has a form: `lora` (a product of rank r), `vector` (one value per output; for C one
per input), `scalar`, or `none`. The five together are a linear's *structure*, written as five
words in the order A B C D E: `lora vector none scalar none`. There are 4·4·3·3·3 = 432.
"""

from dataclasses import dataclass, field, fields

from qlora_kit.adapters.method import ALL_LINEAR
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.patterns import matches

FORMS: dict[str, tuple[str, ...]] = {
    "a": ("lora", "vector", "scalar", "none"),
    "b": ("lora", "vector", "scalar", "none"),
    "c": ("lora", "vector", "none"),
    "d": ("vector", "scalar", "none"),
    "e": ("vector", "scalar", "none"),
}
"""Support to the forms it may have."""


@dataclass(frozen=True, slots=True)
class Structure:
    """Forms of the five supports of one linear.

    Example:
        >>> Structure.parse("lora vector none scalar none").count(8, 16, rank=2, bias=True)
        57
        >>> str(Structure(a="none", c="none", d="none", e="none"))  # this is LoRA
        'none lora none none none'
    """

    a: str = "lora"
    """Of A, which multiplies the weight."""
    b: str = "lora"
    """Of B, which is added to the weight."""
    c: str = "lora"
    """Of C, whose image under the weight is added to the bias."""
    d: str = "vector"
    """Of D, which multiplies the bias."""
    e: str = "vector"
    """Of E, which is added to the bias."""

    def __post_init__(self) -> None:
        """Refuse forms that a support does not have.

        Raises:
            ConfigError: with the forms it has.
        """
        for support, forms in FORMS.items():
            if getattr(self, support) not in forms:
                raise ConfigError(
                    f"glora's {support.upper()} may be {', '.join(forms)}, got "
                    f"{getattr(self, support)!r}."
                )

    @classmethod
    def parse(cls, text: str) -> "Structure":
        """Read five words.

        Args:
            text: forms of A, B, C, D and E.

        Returns:
            The structure.

        Raises:
            ConfigError: there are not five words, or one is no form of its support.
        """
        words = text.split()
        if len(words) != len(FORMS):
            raise ConfigError(
                f"a structure is five words, for A B C D E (lora vector none scalar none): got "
                f"{text!r}."
            )
        return cls(*words)

    def on(self, *, bias: bool) -> "Structure":
        """The structure on a linear: without a bias D multiplies nothing.

        Args:
            bias: whether the linear has one.

        Returns:
            The same, or with D `none`.
        """
        return self if bias else Structure(self.a, self.b, self.c, "none", self.e)

    def count(self, n: int, k: int, *, rank: int, bias: bool) -> int:
        """Number of trained values.

        Args:
            n: output features.
            k: input features.
            rank: r.
            bias: whether the linear has one.

        Returns:
            The sum over the five supports.
        """
        sizes = {"lora": rank * (n + k), "vector": n, "scalar": 1, "none": 0}
        of_c = {"lora": rank * (k + 1), "vector": k, "none": 0}[self.c]
        own = self.on(bias=bias)
        return sum(sizes[form] for form in (own.a, own.b, own.d, own.e)) + of_c

    def __str__(self) -> str:
        """Five words that `parse` reads."""
        return " ".join(getattr(self, field.name) for field in fields(self))


def support_shapes(structure: Structure, n: int, k: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of one linear.

    Args:
        structure: as it is on the linear (`Structure.on`).
        n: output features.
        k: input features.
        rank: r.

    Returns:
        Key to shape.

    Example:
        >>> support_shapes(Structure.parse("vector lora none none scalar"), 4, 8, 2)
        {'A_d': (4, 1), 'B_d': (4, 2), 'B_u': (2, 8), 'E': (1,)}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for letter, form in (("A", structure.a), ("B", structure.b)):
        if form == "lora":
            shapes[f"{letter}_d"], shapes[f"{letter}_u"] = (n, rank), (rank, k)
        elif form != "none":
            shapes[f"{letter}_d"] = (n, 1) if form == "vector" else (1, 1)
    if structure.c == "lora":
        shapes["C_d"], shapes["C_u"] = (k, rank), (rank, 1)
    elif structure.c == "vector":
        shapes["C_d"] = (k, 1)
    for letter, form in (("D", structure.d), ("E", structure.e)):
        if form != "none":
            shapes[letter] = (n,) if form == "vector" else (1,)
    return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class GLoRA:
    """Weight and bias of a linear scaled and shifted by five small supports (arXiv:2306.07967).

    Example:
        >>> GLoRA(structures={"v_proj": "lora none none none none"}).structure_of("h.0.v_proj").b
        'none'
    """

    rank: int = 4
    """r of every support that is `lora`."""
    structure: str = "lora lora lora vector vector"
    """Forms of A B C D E: lora, vector, scalar or none each; C has no scalar, D and E no lora."""
    structures: dict[str, str] = field(default_factory=dict)
    """Pattern to structure, for linears that differ; the first match counts. A search fills it."""
    super_net: bool = False
    """Train all structures at once: each batch draws one for every linear, all share values."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """`all-linear` (every linear of the blocks, not the head), name endings, or `re:` patterns."""
    dtype: str = "float32"
    """Dtype of the trained values; products run in the dtype of x."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: a field is out of range.
        """
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}.")
        for text in (self.structure, *self.structures.values()):
            Structure.parse(text)

    def structure_of(self, module_name: str) -> Structure:
        """Structure of one linear: the first entry of `structures` that matches, else `structure`.

        Args:
            module_name: its dotted name.

        Returns:
            The structure.
        """
        own = (text for pattern, text in self.structures.items() if matches(module_name, pattern))
        return Structure.parse(next(own, self.structure))
