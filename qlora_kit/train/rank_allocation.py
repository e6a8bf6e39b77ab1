"""AdaLoRA in the loop: its term in the loss, scores before an update, ranks after it.

`Trainer` makes one of these for an AdaLoRA adapter and adds it to its callbacks; nothing
else in the loop knows the method. The term depends on no batch: its gradient is added once per
update, behind the last of the batches, in closed form; so forward and backward of a batch
are LoRA's, and are recorded as a CUDA graph as LoRA's are. Importance needs the values that
the gradient was taken at, so it is followed before the optimizer's step; ranks are set after
it. In a float16 run an update whose gradients overflowed is skipped here as the optimizer
skips it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.adalora.layer import AdaLoRALinear, add_orthogonality, orthogonality
from qlora_kit.adapters.adalora.rank_allocator import RankAllocator
from qlora_kit.adapters.attached import AttachedAdapter


class RankAllocation(TrainerCallback):
    """Trains an AdaLoRA adapter as the method says; see the module's text.

    Attributes:
        allocator: scores and ranks.
        form: of the term in the loss, `code` or `paper`.
        weight: γ.

    Example:
        >>> from torch import nn
        >>> from qlora_kit.adapters.inject import attach
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> ranks = RankAllocation.of(attach(model, AdaLoRA(rank=2)))
        >>> float(ranks.penalty()) > 0
        True
    """

    def __init__(self, modules: list[AdaLoRALinear], config: AdaLoRA) -> None:
        """Begin with every rank whole.

        Args:
            modules: of one adapter, in the model's order.
            config: the adapter's.
        """
        self.modules = modules
        self.weight = config.budget.orthogonality
        self.form = config.budget.orthogonality_form
        self.allocator = RankAllocator(modules, config.budget, target_rank=config.target_rank)

    @classmethod
    def of(cls, adapter: AttachedAdapter) -> "RankAllocation | None":
        """Make what an adapter needs.

        Args:
            adapter: attached.

        Returns:
            None unless it is AdaLoRA.
        """
        if not isinstance(adapter.config, AdaLoRA):
            return None
        modules = [piece for piece in adapter.pieces if isinstance(piece, AdaLoRALinear)]
        return cls(modules, adapter.config)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """The term in the loss of one update.

        Returns:
            () float32, γ·R.
        """
        if self.weight == 0.0:
            return torch.zeros((), device=self.modules[0].lora_A.device)
        return self.weight * orthogonality(self.modules, self.form)

    def add_gradients(self, loss_scale: Tensor | None) -> Tensor:
        """Add the term's gradient to those of an update's batches.

        Args:
            loss_scale: () what they are multiplied by for now, in a float16 run; else None.

        Returns:
            As `penalty`.
        """
        if self.weight == 0.0:
            return self.penalty()
        return add_orthogonality(self.modules, self.weight, self.form, loss_scale=loss_scale)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a budget that does not fit the run; forget an earlier run's scores."""
        self.allocator.budget.phases(state.max_steps)
        if state.global_step == 0:
            self.allocator.reset()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow importance."""
        if args.fp16 and not self._finite():
            return
        self.allocator.observe(state.global_step + 1, updates=state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Distribute ranks where it is time to."""
        self.allocator.allocate(state.global_step + 1, updates=state.max_steps)

    def save(self, folder: Path) -> None:
        """Write scores and ranks into a checkpoint.

        Args:
            folder: exists.
        """
        self.allocator.save(folder)

    def load(self, folder: Path) -> None:
        """Take scores and ranks over from a checkpoint.

        Args:
            folder: the checkpoint.

        Raises:
            SourceError: it has none.
            FormatError: they are damaged, or another adapter's.
        """
        self.allocator.load(folder)

    def _finite(self) -> bool:
        gradients = [p.grad for m in self.modules for p in m.trainable().values()]
        norms = torch._foreach_norm([g for g in gradients if g is not None])
        return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
