"""LoRA on an input embedding: rows looked up in W and in a low-rank table beside it.

    y = W[ids] + s · A[:, ids]ᵀ Bᵀ        W (V, H), A (r, V), B (H, r); ΔW = s (B A)ᵀ

A token's row of A is all that its gradient touches, so dA is zero but for the tokens of
the batch. As in the reference code and in PEFT, A starts at zero and B at N(0, 1), the
reverse of a linear: the start is the base, and each row of A learns from the first
update on. There is no dropout. The padding token learns nothing where the base has a
`padding_idx`. Models that scale their embeddings (Gemma) scale the low-rank part too, so
that it is a change of W.

Named like a linear in `targets` (`embed_tokens`, `wte`, `word_embeddings`); `all-linear`
takes no embeddings, ("all-linear", "embed_tokens") takes both. Seen as a linear map of
one-hot rows it stores its weight transposed, and merges like GPT-2's linears do. Where
the head has the same tensor for its weight (tied), training works, on the input side
alone, but a merge is refused: it would change the head as well. PEFT calls the pair
`lora_embedding_A` and `lora_embedding_B`; adapters go both ways.

Defaults: LoRA's, rank 16 and alpha 32; no embedding is adapted unless `targets` names it.

Source: arXiv:2106.09685, its reference code (`loralib.Embedding`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.adapters.linears import seeded
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.protocol import EmbeddingWrapper
from qlora_kit.core.errors import AdapterError


class LoRAEmbedding(EmbeddingWrapper):
    """An embedding with a low-rank table beside it; takes the embedding's place in the model.

    Attributes:
        lora_embedding_A: (r, V) in the master dtype; zero at the start.
        lora_embedding_B: (H, r) in the master dtype.
        scale: s.

    Example:
        >>> table = nn.Embedding(10, 4)
        >>> adapted = LoRAEmbedding(table, "embed", LoRA(rank=2), seed=0)
        >>> ids = torch.tensor([[1, 7]])
        >>> torch.equal(adapted(ids), table(ids)), adapted.lora_embedding_A.shape
        (True, torch.Size([2, 10]))
    """

    def __init__(
        self,
        base: nn.Embedding,
        place: str,
        config: LoRA,
        *,
        seed: int,
        rank: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Wrap one embedding.

        Args:
            base: a table that looks rows up, scaled by `embed_scale` if it has one.
            place: its dotted name in the model.
            config: rank, scale and dtype, by the patterns that match `place`.
            seed: the run's.
            rank: instead of the configuration's, for an adapter read from a file.
            scale: likewise.

        Raises:
            AdapterError: the method is not plain LoRA, or the table does more than look up.
        """
        super().__init__(base, place)
        _refuse(base, place, config)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.rank = config.rank_of(place) if rank is None else rank
        self.scale = config.scale_of(place) if scale is None else scale
        device, dtype = base.weight.device, getattr(torch, config.dtype)
        a = torch.zeros(self.rank, self.num_embeddings, device=device, dtype=dtype)
        b = torch.empty(self.embedding_dim, self.rank, device="meta")
        if device.type != "meta":
            b = torch.empty_like(b, device="cpu").normal_(generator=seeded(place, seed))
        self.lora_embedding_A = nn.Parameter(a)
        self.lora_embedding_B = nn.Parameter(b.to(device, dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up.

        Args:
            ids: any shape, int64.

        Returns:
            (*ids.shape, H) in the dtype the base answers with.
        """
        y: Tensor = self.base(ids)
        if not self.enabled:
            return y
        z = F.embedding(ids, self.lora_embedding_A.T, padding_idx=self.base.padding_idx)
        added = (z.to(y.dtype) @ self.lora_embedding_B.T.to(y.dtype)).mul(self.scale)
        factor = getattr(self.base, "embed_scale", None)
        if factor is not None:
            added = added * factor.to(added.dtype)
        return y + added.to(y.dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        """A and B."""
        return {
            "lora_embedding_A": self.lora_embedding_A,
            "lora_embedding_B": self.lora_embedding_B,
        }

    def state(self) -> dict[str, Tensor]:
        """A and B."""
        return dict(self.trainable())

    def low_rank(self) -> LowRank:
        """Describe the piece as files hold it; tensors are shared."""
        return LowRank.of(self.state(), self.scale)

    def own_state(self, pair: LowRank) -> dict[str, Tensor]:
        """Give the values that `low_rank` described their own names, as `state` has them."""
        return pair.named()

    def merge_delta(self) -> Tensor:
        """Compute s·B·A.

        Returns:
            (H, V) float32: (out, in), as for linears that store their weight transposed.
        """
        a, b = self.lora_embedding_A.detach().float(), self.lora_embedding_B.detach().float()
        return torch.mm(b, a).mul_(self.scale)

    def extra_repr(self) -> str:
        """Show what distinguishes this table."""
        return f"rank={self.rank}, scale={self.scale:g}"


def _refuse(base: nn.Embedding, place: str, config: LoRA) -> None:
    """Raise where the low-rank table would not be a change of the base's."""
    plain = type(config) is LoRA and config.init in ("kaiming", "gaussian")
    scaled = isinstance(getattr(base, "embed_scale", None), Tensor)
    known = scaled or type(base).forward is nn.Embedding.forward
    if not plain:
        raise AdapterError(
            f"targets: {place} is an embedding, which only lora and rslora with a random start "
            "adapt. Leave it out, or train it whole with train_modules."
        )
    if base.max_norm is not None or not known:
        raise AdapterError(
            f"targets: {place} ({type(base).__name__}) does more than look rows up (a largest "
            "norm, or code of its own), so no low-rank table can be added to it. Leave it out."
        )
