"""What methods cannot do: merge into the base, train on packed rows. Free of torch."""

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.selective.config import Full


def why_not_merged(config: Method) -> str | None:
    """Say why what a method trains is not a change of the base's tensors.

    Args:
        config: of any method.

    Returns:
        A sentence, or None for a method that merges.

    Example:
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> why_not_merged(LoRA()) is None
        True
        >>> why_not_merged(Bottleneck())
        'A bottleneck adapter is a layer of its own, with a nonlinearity: ...'
    """
    if isinstance(config, Bottleneck):
        return (
            "A bottleneck adapter is a layer of its own, with a nonlinearity: no weight of the "
            "base can take it in. Keep the adapter beside the base model."
        )
    if isinstance(config, GLoRA) and config.super_net:
        return (
            "A GLoRA super-net is many structures at once. Search the best one first "
            "(`qlora-kit search`), and merge that."
        )
    if isinstance(config, Full):
        return "Full fine-tuning saves the whole model: there is nothing to merge."
    if isinstance(config, PrefixTuning | PromptTuning):
        return (
            "A prefix or a prompt takes positions of its own beside the tokens: no weight of the "
            "base can take it in. Keep the adapter beside the base model."
        )
    return None


def sees_packed_rows(config: Method) -> bool:
    """Tell whether a method acts alike on every document of a packed row.

    Args:
        config: of any method.

    Returns:
        False for prompts and infixes.

    Example:
        >>> sees_packed_rows(PrefixTuning()), sees_packed_rows(PromptTuning())
        (True, False)
    """
    if isinstance(config, PrefixTuning):
        return config.place == "prefix"
    return not isinstance(config, PromptTuning)
