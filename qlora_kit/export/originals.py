"""The weights a model had before it was quantized, one at a time from its checkpoint.

LoftQ's start (`adapter.init: loftq`) needs them beside the quantized ones.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qlora_kit.checkpoint.source import Source, open_source
from qlora_kit.core.errors import AdapterError, FormatError
from qlora_kit.export.naming import build_skeleton, is_transposed, map_names


def original_weights(
    base: str | Path | Source, *, revision: str | None = None, task_type: str | None = None
) -> Callable[[str], Tensor]:
    """Make the reader that `attach(..., originals=...)` wants.

    Args:
        base: a 16-bit checkpoint: a folder, a GGUF file, a hub id, or opened already.
        revision: branch, tag or commit of a hub id.
        task_type: PEFT's name of the model's task, where it is not the checkpoint's own.

    Returns:
        A function from a module's name to its weight, (out, in) in the checkpoint's dtype, on
        the CPU. It raises AdapterError for modules that the checkpoint does not hold so.

    Raises:
        FormatError: the checkpoint is quantized itself.

    Example:
        >>> original_weights("none")
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: ...
    """
    source = base if isinstance(base, Source) else open_source(base, revision=revision)
    if source.is_nf4:
        raise FormatError(
            f"{source.folder} is a 4-bit model, which has no original weights. Name the 16-bit "
            "model it was made from, or start with init pissa or kaiming."
        )
    model = build_skeleton(source, task_type=task_type)
    modules = dict(model.named_modules())
    entries = map_names(model, source.weight_names())
    by_param = {entry.param: entry for entry in entries.values()}

    def weight(module: str) -> Tensor:
        entry = by_param.get(f"{module}.weight")
        if entry is None or entry.opaque or entry.part is not None:
            raise AdapterError(
                f"{source.folder} holds no tensor that is the weight of {module} as it stands. "
                "Use init pissa or kaiming, or leave the module out of targets."
            )
        found = source.read(entry.name)
        return found.T if is_transposed(modules[module]) else found

    return weight
