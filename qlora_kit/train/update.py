"""One update of the Trainer's loop: gradients gathered, corrected, clipped; flat AdamW.

`transformers.Trainer` calls three methods between the last backward pass and the next
forward: `create_optimizer` (once), `_clip_grad_norm`, `_get_grad_norm`. Overriding them is
all that is needed; the loop, schedules and accelerate's wrapping stay. With a flat
optimizer the norm is one reduction over one buffer and stays on the device until it is
logged. Optimizers that have no flat counterpart take the parent's way.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.optim.corrected import CorrectedGradient
from qlora_kit.optim.create import FLAT_NAMES, flat_optimizer, make_flat_optimizer


class UpdatingTrainer(transformers.Trainer):
    """A `transformers.Trainer` whose updates cost a few kernels, however many tensors train."""

    adapter: AttachedAdapter
    optimizer: torch.optim.Optimizer | None
    _correction: CorrectedGradient | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name, on flat buffers if it has such a form.

        Args:
            model: whose parameters it trains; None: the Trainer's.

        Returns:
            The optimizer, also kept as `self.optimizer`.

        Raises:
            AdapterError: the corrected gradient is asked for where A is trained.
        """
        self._correction = CorrectedGradient.of(self.adapter)
        if self.optimizer is None and self._may_be_flat():
            target = self.model if model is None else model
            wanted, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = self._decay_groups(target)
            self.optimizer = make_flat_optimizer(groups, wanted, options, model=target)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

    def _may_be_flat(self) -> bool:
        """Whether it is an AdamW by name, and nobody else lays out the parameters.

        By name, since asking Transformers for some other optimizers already hooks them in.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        named = str(getattr(self.args.optim, "value", self.args.optim)) in FLAT_NAMES
        return named and not sharded and self.optimizer_cls_and_kwargs is None

    def _decay_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters that decay and those that do not, as the parent groups them."""
        decaying = set(self.get_decay_parameter_names(model))
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return [
            {
                "params": [p for n, p in trained if (n in decaying) == decays],
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        return self._finish_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        if grad_norm is None:  # nothing clips
            grad_norm = self._finish_gradients(model, None)
        norm: Tensor | float | None = super()._get_grad_norm(model, grad_norm)
        return norm

    def _finish_gradients(self, model: nn.Module, max_norm: float | None) -> Tensor | float:
        """Correct, unscale, measure and clip: the order in which they commute with overflow.

        The correction is linear, so it may come before float16's loss scale is divided
        out; values that are not finite stay so, and the scaler skips the update.
        """
        if self._correction is not None:
            self._correction.apply()
        flat = flat_optimizer(self.optimizer)
        if flat is not None:
            self.accelerator.unscale_gradients()
            return flat.clip_grad_norm(max_norm)
        norm: Tensor | float
        if max_norm is not None:
            norm = super()._clip_grad_norm(model)
            return norm
        norm = super()._get_grad_norm(model)
        return norm
