"""Several adapters in one model: switched, combined, and side by side in one batch.

The base is there once, in 4 or 16 bits, and its linears make one pass over it for a whole
batch, whoever answers its rows. An adapter is a few percent of that: r·(K + N) values for each
linear it changes, in the dtype of its file (`AdapterBank.nbytes`). While it answers it takes as
many again in the dtype that the model computes in, where that is another; inside `rows` those
that occur are copied side by side, once for each form in use. Planner and trainer know nothing
of this: one adapter is trained at a time (`inject.attach`), and these answer.

    bank = load_adapters(model, {"french": "adapters/french", "legal": "adapters/legal"})
    bank.use("french")                                      # all rows; None: the base alone
    bank.combine("both", {"french": 0.7, "legal": 0.3})     # 0.7·ΔW + 0.3·ΔW', as a third one
    with bank.rows(["french", None, "both"]):               # a batch of three rows
        model.generate(**batch)

What is saved as a LoRA can be loaded: LoRA, rsLoRA, LoRA-FA, PiSSA, LoftQ, slices, embeddings,
AdaLoRA with λ multiplied in, and modules that were trained whole, such as a classifier's head;
ours and PEFT's. Not DoRA, which divides by the length of each changed row, so that its changes do
not add up; nor what is no change of a weight (prompts, bottlenecks), or not a low-rank one.

Keys and values in a cache are the work of the adapter that made them: start a new cache after
switching. Dispatch of tokens to experts changes the order of rows, so that experts
cannot have different adapters for different rows.

The limitation this takes away is named in arXiv:2106.09685, section 4.2. `batch_rows.py` has the
arithmetic, `combine.py` that of combinations.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from qlora_kit.adapters.inject import refuse_second
from qlora_kit.adapters.multi_adapter.bank import AdapterBank
from qlora_kit.adapters.multi_adapter.files import read_low_rank
from qlora_kit.core.errors import AdapterError


def load_adapters(model: nn.Module, folders: Mapping[str, Path | str]) -> AdapterBank:
    """Load several adapters onto a model, side by side; the base answers until one is chosen.

    Args:
        model: the base they were trained on, without an adapter; frozen from here on.
        folders: a name of your choice to an adapter folder, ours or PEFT's. More can come later.

    Returns:
        What switches, combines and saves them.

    Raises:
        SourceError: a file is missing.
        FormatError: a file is malformed or of a method that is not supported.
        AdapterError: an adapter does not fit the model or is no LoRA, or the model has one already.

    Example:
        >>> import tempfile
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> from qlora_kit.adapters.inject import attach
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> folder = Path(tempfile.mkdtemp()) / "adapter"
        >>> adapter = attach(model, LoRA(rank=2))
        >>> adapter.save(folder)
        >>> adapter.detach_from_model()
        >>> bank = load_adapters(model, {"one": folder, "two": folder})
        >>> bank.use("two")
        >>> bank
        AdapterBank(one, two; two answers; 1 modules, 192 B)
    """
    refuse_second(model)
    found = {name: read_low_rank(model, folder) for name, folder in folders.items()}
    bank = AdapterBank(model)
    try:
        for name, files in found.items():
            bank.add_files(name, files)
    except AdapterError:
        bank.detach_from_model()
        raise
    return bank
