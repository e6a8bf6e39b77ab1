"""AdaLoRA's bookkeeping: how important each triplet is, and which ones the budget keeps.

A triplet is column j of P, λ_j and row j of Q of one matrix. With t the update:

    I  = |w·∇w|                        of every value w, before the optimizer moves it
    Ī  ← β₁·Ī + (1 − β₁)·I             sensitivity
    U  ← β₂·U + (1 − β₂)·|I − Ī|       uncertainty, with the new Ī
    s  = Ī·U
    S_j = s(λ_j) + mean of s over P's column j + mean of s over Q's row j

Every ΔT updates the b(t) triplets of highest S in the whole model keep their λ, and all
others' is set to zero. The sort is stable: of equal scores, the one that comes first in the
model stays, so exactly b(t) are kept and every run and machine keeps the same ones. (A
threshold, as in other implementations, drops or keeps all that are equal to it.) P, Q and
all λ are trained on, so what was dropped can come back at the next distribution.

From update T − t_f on, scores are not followed and the choice is final: after every update
the λ it left out are zero again.

∇w is the gradient that the optimizer gets: of all accumulated batches and devices, clipped.
Scores are float32, whatever the masters' dtype. All of a model's values are treated by a few
multi-tensor launches, and nothing waits for the GPU except to write down ranks, once per
distribution. The scores are part of a checkpoint (`save`), since later choices depend on them.

Source: arXiv:2303.10512, sections 3.2 and 3.3; importance as in its Eqs. 8 to 11.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_kit.adapters.adalora.config import RankBudget
from qlora_kit.adapters.adalora.layer import AdaLoRALinear
from qlora_kit.core.errors import FormatError, SourceError

SCORES_FILE = "adalora.safetensors"
"""In a checkpoint: sensitivity and uncertainty of every value, and the ranks so far."""


@dataclass(slots=True)
class RankHistory:
    """Ranks of every matrix over time, as a run's record keeps them.

    Example:
        >>> RankHistory(modules=("q_proj",), updates=[0], budget=[4], ranks=[[4]]).to_dict()
        {'modules': ['q_proj'], 'updates': [0], 'budget': [4], 'ranks': [[4]]}
    """

    modules: tuple[str, ...]
    """Dotted names of the adapted linears."""
    updates: list[int] = field(default_factory=list)
    """When the budget was distributed; 0 is the start."""
    budget: list[int] = field(default_factory=list)
    """b(t) at each of them."""
    ranks: list[list[int]] = field(default_factory=list)
    """For each of them, the rank of every module."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {
            "modules": list(self.modules),
            "updates": self.updates,
            "budget": self.budget,
            "ranks": self.ranks,
        }


class RankAllocator:
    """Follows importance and distributes ranks; see the module's text.

    Call `observe` between the backward pass and the optimizer's step, `allocate` after it.

    Attributes:
        history: ranks so far.

    Example:
        >>> from qlora_kit.adapters.adalora.config import AdaLoRA
        >>> budget = RankBudget(target_rank=1, start_updates=0, final_updates=0)
        >>> config = AdaLoRA(rank=2, budget=budget)
        >>> layer = AdaLoRALinear(nn.Linear(8, 4), "proj", config, seed=0)
        >>> allocator = RankAllocator([layer], config.budget, target_rank=config.target_rank)
        >>> layer(torch.ones(1, 8)).square().sum().backward()
        >>> allocator.observe(1, updates=1)
        >>> _ = layer.lora_E.data.fill_(0.5)  # an optimizer moves it
        >>> allocator.allocate(1, updates=1)
        >>> int((layer.lora_E != 0).sum()), allocator.history.ranks
        (1, [[2], [1]])
    """

    def __init__(
        self, modules: Sequence[AdaLoRALinear], budget: RankBudget, *, target_rank: int
    ) -> None:
        """Begin with every rank whole.

        Args:
            modules: of one adapter, in the model's order, on one device.
            budget: how ranks fall.
            target_rank: average rank at the end.
        """
        self.modules = tuple(modules)
        self.budget = budget
        self.whole = sum(module.rank for module in self.modules)
        self.target = min(self.whole, target_rank * len(self.modules))
        named = {f"{m.place}.{key}": p for m in self.modules for key, p in m.trainable().items()}
        self._names = list(named)
        self._values: list[nn.Parameter] = list(named.values())
        self.reset()

    def reset(self) -> None:
        """Forget everything observed."""
        self._sensitivity = [torch.zeros_like(p, dtype=torch.float32) for p in self._values]
        self._uncertainty = [torch.zeros_like(p, dtype=torch.float32) for p in self._values]
        self._final: Tensor | None = None
        self._masks: list[Tensor] = []
        places = tuple(module.place for module in self.modules)
        ranks = [module.rank for module in self.modules]
        self.history = RankHistory(places, [0], [self.whole], [ranks])

    @torch.no_grad()
    def observe(self, update: int, *, updates: int) -> None:
        """Follow the importance of every value; call before the optimizer's step.

        Args:
            update: the number of the update about to be made, from 1.
            updates: of the whole run.
        """
        _, end = self.budget.phases(updates)
        if update > end:
            return
        found = [i for i, p in enumerate(self._values) if p.grad is not None]
        if not found:
            return
        values = [self._values[i].float() for i in found]
        gradients = [g.float() for i in found if (g := self._values[i].grad) is not None]
        importance = list(torch._foreach_mul(values, gradients))
        torch._foreach_abs_(importance)
        mean = [self._sensitivity[i] for i in found]
        torch._foreach_lerp_(mean, importance, 1.0 - self.budget.beta1)
        torch._foreach_sub_(importance, mean)
        torch._foreach_abs_(importance)
        spread = [self._uncertainty[i] for i in found]
        torch._foreach_lerp_(spread, importance, 1.0 - self.budget.beta2)

    @torch.no_grad()
    def allocate(self, update: int, *, updates: int) -> None:
        """Set the λ that the budget does not keep to zero; call after the optimizer's step.

        Args:
            update: the number of the update just made, from 1.
            updates: of the whole run.
        """
        _, end = self.budget.phases(updates)
        if update > end:
            if self._final is not None:
                if not self._masks:
                    self._masks = self._masks_of(self._final)
                self._zero(self._masks)
            return
        if not self.budget.distributes(update, updates):
            return
        count = self.budget.at(update, self.whole, self.target, updates)
        kept = keep_best(self.scores(), count)
        masks = self._masks_of(kept)
        self._zero(masks)
        self._final, self._masks = (kept, masks) if update == end else (None, [])
        ranks = [int(part.sum()) for part in kept.cpu().split([m.rank for m in self.modules])]
        self.history.updates.append(update)
        self.history.budget.append(count)
        self.history.ranks.append(ranks)

    def scores(self) -> Tensor:
        """Score every triplet of the model.

        Returns:
            (b₀,) float32 S, module after module.
        """
        products = iter(torch._foreach_mul(self._sensitivity, self._uncertainty))
        scores = []
        for _ in self.modules:
            q, values, p = next(products), next(products), next(products)
            scores.append(values.reshape(-1) + p.mean(0) + q.mean(1))
        return torch.cat(scores)

    def save(self, folder: Path) -> None:
        """Write the scores into a checkpoint.

        Args:
            folder: exists.
        """
        tensors = {}
        for name, mean, spread in zip(
            self._names, self._sensitivity, self._uncertainty, strict=True
        ):
            tensors[f"{name}.sensitivity"], tensors[f"{name}.uncertainty"] = mean, spread
        if self._final is not None:
            tensors["final"] = self._final
        metadata = {"format": "pt", "history": json.dumps(self.history.to_dict())}
        cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(cpu, folder / SCORES_FILE, metadata=metadata)

    def load(self, folder: Path) -> None:
        """Take over the scores of a checkpoint.

        Args:
            folder: the checkpoint.

        Raises:
            SourceError: it has none.
            FormatError: they are damaged, or another adapter's.
        """
        path = folder / SCORES_FILE
        if not path.is_file():
            raise SourceError(
                f"{folder} has no {SCORES_FILE}: it is no checkpoint of an AdaLoRA run. Resume "
                "with the method it was trained with, or start without resume."
            )
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                history = json.loads((file.metadata() or {})["history"])
            for i, name in enumerate(self._names):
                self._sensitivity[i].copy_(tensors[f"{name}.sensitivity"])
                self._uncertainty[i].copy_(tensors[f"{name}.uncertainty"])
            final = tensors.get("final")
            self._final = None if final is None else final.to(self._values[0].device)
            self._masks = []
            self.history = RankHistory(
                tuple(history["modules"]), history["updates"], history["budget"], history["ranks"]
            )
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise FormatError(
                f"{path} does not belong to this adapter or is damaged: {error}. Resume with the "
                "configuration of the interrupted run."
            ) from error

    def _masks_of(self, kept: Tensor) -> list[Tensor]:
        """One and zero for every λ, in the shapes and the dtype of the modules'."""
        parts = kept.to(self.modules[0].lora_E.dtype).split([m.rank for m in self.modules])
        return [part.reshape(-1, 1) for part in parts]

    def _zero(self, masks: list[Tensor]) -> None:
        torch._foreach_mul_([module.lora_E for module in self.modules], masks)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Choose the highest scores; of equal ones those that come first.

    Args:
        scores: (n,) of any float dtype.
        count: how many to keep.

    Returns:
        (n,) bool with exactly min(count, n) True.

    Example:
        >>> keep_best(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2)
        tensor([False,  True,  True, False, False])
    """
    order = torch.argsort(scores, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[order[:count]] = True
    return kept
