"""The methods a benchmark compares, by the name a user gives them.

Full fine-tuning comes in mixed precision, which is what every ratio is against, and in pure
bf16, which is shown beside it. Ours come on a 16-bit and on a 4-bit base. Peers are named as
in their own package and measured as QLoRA, the one method all of them know.

Free of torch: the command line's help lists these names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to fine-tune."""

    title: str
    """For tables."""
    impl: str = "qlora_kit"
    """Who runs it: `full`, `qlora_kit` or a peer."""
    method: str = "lora"
    """`full`, `lora` or `lora_fa`."""
    bits: int = 4
    """Of the frozen linears."""
    masters: str = "library"
    """See `subject.Build`."""
    optimizer: str = "adamw_8bit"
    """A Transformers name."""
    variant: str = ""
    """Switches of a peer."""

    @property
    def key(self) -> tuple[object, ...]:
        """What tells its rows from those of others."""
        paged = self.optimizer.startswith("paged")
        return (self.impl, self.method, self.bits, self.masters, self.variant, paged)


FULL = "full"
"""The method that others are compared with."""

METHODS: dict[str, Method] = {
    FULL: Method(
        title="full, mixed precision",
        impl="full",
        method="full",
        bits=16,
        masters="float32",
        optimizer="adamw_torch_fused",
    ),
    "full_bf16": Method(
        title="full, all in bf16",
        impl="full",
        method="full",
        bits=16,
        optimizer="adamw_torch_fused",
    ),
    "lora": Method(title="LoRA, 16-bit base", bits=16),
    "lora_fa": Method(title="LoRA-FA, 16-bit base", method="lora_fa", bits=16),
    "qlora": Method(title="QLoRA"),
    "qlora_fa": Method(title="QLoRA + LoRA-FA", method="lora_fa"),
    "qlora_paged": Method(title="QLoRA, paged 8-bit", optimizer="paged_adamw_8bit"),
}
"""Ours, and what they are compared with; in the order of tables."""

PEERS: dict[str, Method] = {
    "peft": Method(title="PEFT + bitsandbytes", impl="peft"),
    "peft_liger": Method(title="PEFT + bitsandbytes + Liger", impl="peft_liger"),
    "unsloth": Method(title="Unsloth", impl="unsloth", variant="compile"),
    "unsloth_eager": Method(title="Unsloth, not compiled", impl="unsloth", variant="eager"),
}
"""QLoRA by others, where they are installed."""

ALL = {**METHODS, **PEERS}
"""Every name."""


def method_of(row: Mapping[str, Any]) -> str:
    """The name of the method a row is about.

    Args:
        row: of a record.

    Returns:
        A key of `ALL`; the row's own `impl` and `method` for one that is not among them.

    Example:
        >>> method_of({"impl": "qlora_kit", "method": "lora", "bits": 16, "masters": "library",
        ...     "variant": "", "optimizer": "adamw_8bit"})
        'lora'
    """
    fields = (row["impl"], row["method"], row["bits"], row["masters"], row["variant"])
    key = (*fields, str(row["optimizer"]).startswith("paged"))
    return next((name for name, m in ALL.items() if m.key == key), f"{row['impl']} {row['method']}")


def title_of(row: Mapping[str, Any]) -> str:
    """The method of a row, for tables.

    Args:
        row: of a record.

    Returns:
        A few words.

    Example:
        >>> title_of({"impl": "peft", "method": "lora", "bits": 4, "masters": "library",
        ...     "variant": "", "optimizer": "adamw_8bit"})
        'PEFT + bitsandbytes'
    """
    name = method_of(row)
    return ALL[name].title if name in ALL else name
