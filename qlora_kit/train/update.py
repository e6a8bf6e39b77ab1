"""One update of the Trainer's loop: gradients gathered, corrected, clipped; flat AdamW.

`transformers.Trainer` calls three methods between the last backward pass and the next
forward: `create_optimizer` (once), `_clip_grad_norm`, `_get_grad_norm`. Overriding them is
all that is needed; the loop, schedules and accelerate's wrapping stay. With a flat
optimizer the norm is one reduction over one buffer and stays on the device until it is
logged. Optimizers that have no flat counterpart take the parent's way.

LoRA+ (arXiv:2402.12354, `adapter.lr_ratio_b`) is two more parameter groups: B with a multiple
of the learning rate that A and everything else have. Schedules scale both alike; what is
logged is A's rate. Nothing else changes: a ratio of one, the default, makes the groups the parent
makes; the paper proposes 16.

DeepSpeed and FSDP, which the Trainer's arguments or `accelerate launch` can turn on, divide
gradients among processes; DeepSpeed takes them out of `.grad` altogether. What works on the whole
gradient of a matrix, AdaLoRA and the corrected gradient, is refused there.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.selective.config import Full
from qlora_kit.core.errors import ConfigError
from qlora_kit.optim.corrected import CorrectedGradient
from qlora_kit.optim.create import FLAT_NAMES, flat_optimizer, make_flat_optimizer
from qlora_kit.train.glora import StructureDraws
from qlora_kit.train.rank_allocation import RankAllocation


class UpdatingTrainer(transformers.Trainer):
    """A `transformers.Trainer` whose updates cost a few kernels, however many tensors train."""

    adapter: AttachedAdapter
    optimizer: torch.optim.Optimizer | None
    _correction: CorrectedGradient | None = None
    ranks: RankAllocation | None = None
    _draws: StructureDraws | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate as the parent does.

        Raises:
            ConfigError: the method needs whole gradients, and they would be divided.
        """
        super().create_accelerator_and_postprocess()
        divider = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return
        if self.ranks is not None:
            what = "method adalora adds its term to whole gradients and follows importance by them"
            instead = "use method lora"
        elif getattr(self.adapter.config, "corrected_gradient", False):
            what, instead = "adapter.corrected_gradient changes whole gradients", "turn it off"
        else:
            return
        raise ConfigError(
            f"{what}, and {divider} divides them among processes, where it would miss them without "
            f"a word. Train without {divider} (on several GPUs data parallel), or {instead}."
        )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one batch; a GLoRA super-net draws its structures for it.

        Args:
            model: the model.
            inputs: a collated batch.
            num_items_in_batch: predicted tokens of all accumulated batches.

        Returns:
            () the detached loss.
        """
        if self._draws is None:
            self._draws = StructureDraws()
        update = self.state.global_step
        with self._draws.drawn(self.adapter, seed=self.args.seed, update=update):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def with_penalty(self, loss: Tensor) -> Tensor:
        """Add the method's own term, and its gradient, behind the last batch of an update.

        Args:
            loss: () of a batch, behind its backward pass, as it counts in the update's.

        Returns:
            () with the whole term, if it was the last; `loss` itself where the method has none.
        """
        if self.ranks is None or not self.accelerator.sync_gradients:
            return loss
        scaler = self.accelerator.scaler
        scale = None if scaler is None else scaler.scale(torch.ones((), device=loss.device))
        return loss + self.ranks.add_gradients(scale)

    def own_values(self) -> dict[str, Tensor]:
        """What a method adds to a log line: how much of the loss is its own term.

        Returns:
            () tensors by name, on the device.
        """
        return {} if self.ranks is None else {"penalty": self.ranks.penalty().detach()}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.ranks is not None and self.args.should_save:
            self.ranks.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ranks is not None and checkpoint is not None:
            self.ranks.load(Path(checkpoint))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name, on flat buffers if it has such a form.

        Args:
            model: whose parameters it trains; None: the Trainer's.

        Returns:
            The optimizer, also kept as `self.optimizer`.

        Raises:
            AdapterError: the corrected gradient is asked for where A is trained.
            ConfigError: two learning rates are asked of an optimizer that cannot have them.
        """
        self._correction = CorrectedGradient.of(self.adapter)
        target = self.model if model is None else model
        if self.optimizer is None and self._may_be_flat():
            wanted, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = self._groups(target)
            self.optimizer = make_flat_optimizer(groups, wanted, options, model=target)
        if self.optimizer is None and self._ratio_b != 1.0:
            self.optimizer = self._grouped_optimizer(target)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

    def _may_be_flat(self) -> bool:
        """Whether it is an AdamW by name, and nobody else lays out the parameters.

        By name, since asking Transformers for some other optimizers already hooks them in.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(self.adapter.config, Full):  # a flat copy of a whole model: twice the memory
            return False
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

    @property
    def _ratio_b(self) -> float:
        """LoRA+'s ratio; one for every other method."""
        config = self.adapter.config
        return config.lr_ratio_b if isinstance(config, LoRA) else 1.0

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parent's groups, and with LoRA+ the same again for B at its own rate."""
        groups = self._decay_groups(model)
        if self._ratio_b == 1.0:
            return groups
        ends = ("lora_B", "lora_embedding_B")
        b = {id(p) for name, p in self.adapter.named_parameters() if name.endswith(ends)}
        faster = [
            group
            | {
                "params": [p for p in group["params"] if id(p) in b],
                "lr": self.args.learning_rate * self._ratio_b,
            }
            for group in groups
        ]
        for group in groups:  # first: the rate that is logged is the first group's
            group["params"] = [p for p in group["params"] if id(p) not in b]
        return groups + faster

    def _grouped_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimizer without a flat form, with LoRA+'s groups."""
        wanted, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        odd = {"params", "model", "optimizer_dict"} & options.keys()
        if odd or self.optimizer_cls_and_kwargs is not None:
            raise ConfigError(
                f"adapter.lr_ratio_b needs an optimizer that takes parameter groups, and "
                f"{self.args.optim} makes its own. Use an AdamW, or set the ratio to 1."
            )
        made: torch.optim.Optimizer = wanted(self._groups(model), **options)
        return made

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
