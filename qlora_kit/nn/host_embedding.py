"""Input embeddings in host memory: rows are looked up on the CPU and sent.

A step reads a few rows of the table and never multiplies by it, but on the GPU it takes as much
memory as the head: 1 GiB in an 8B model, 2 in a 70B one. Here it stays in plain host memory,
in its own dtype, bit for bit. A lookup waits for the token ids to be on the CPU and copies the
rows, 16,384 at a time through pinned memory: 8 KiB a token for an 8B model, which is nothing
beside a step on long rows, but the wait costs short steps the lead of the host, and they cannot
be recorded as a CUDA graph. So it is an option for models and rows that would not fit without.

The table is a buffer and not a parameter: transformers takes a model's device from its first
parameter. It is frozen, part of the state dict under its old name, and `.to(device)` leaves it
where it is. A table that is also the head's weight is refused: the head needs it on the GPU.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_kit.core.errors import ConfigError

ROWS_AT_A_TIME = 16384
"""Of the pinned memory that rows are sent through: 128 MiB for 4,096 values in 16 bits."""


class HostEmbedding(nn.Module):
    """A frozen table of embeddings in host memory.

    Attributes:
        weight: (V, H), on the CPU (on the meta device if it was there).

    Example:
        >>> table = HostEmbedding(torch.arange(6.0).view(3, 2))
        >>> table(torch.tensor([[2, 0]])).tolist()
        [[[4.0, 5.0], [0.0, 1.0]]]
    """

    weight: Tensor

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Take over a table.

        Args:
            weight: (V, H); copied to the CPU if it is elsewhere.
            scale: () factor on the result, or None.
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        kept = weight.detach()
        self.register_buffer("weight", kept if kept.is_meta else kept.to("cpu"))
        self.scale = None if scale is None else scale.detach().to("cpu")

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up.

        Args:
            ids: any shape, int64, on any device.

        Returns:
            (*ids.shape, H) on that device.
        """
        if ids.device == self.weight.device:
            found = F.embedding(ids, self.weight)
        else:
            found = self._send(ids)
        if self.scale is not None:  # rounded to the table's dtype first, as models do
            found = found * self.scale.to(self.weight.dtype).item()
        return found

    def _send(self, ids: Tensor) -> Tensor:  # needs a GPU
        wanted, width = ids.reshape(-1).to("cpu"), self.embedding_dim
        out = torch.empty((len(wanted), width), dtype=self.weight.dtype, device=ids.device)
        for part, into in zip(wanted.split(ROWS_AT_A_TIME), out.split(ROWS_AT_A_TIME), strict=True):
            # torch hands this memory out again only when the copy has left
            rows = torch.empty(into.shape, dtype=out.dtype, pin_memory=ids.is_cuda)
            torch.index_select(self.weight, 0, part, out=rows)
            into.copy_(rows, non_blocking=True)
        return out.view(*ids.shape, width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostEmbedding":
        """Change the dtype as `.to` asks, but not the place."""
        wanted = fn(self.weight.new_empty(0)).dtype
        if self.weight.dtype != wanted:
            self.weight = self.weight.to(wanted)
        return self

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        return f"{self.num_embeddings}, {self.embedding_dim}, in host memory"


def keep_embeddings_on_host(model: PreTrainedModel) -> HostEmbedding:
    """Move a model's input embeddings to host memory.

    Args:
        model: with frozen embeddings that are not its head's weight. Modified.

    Returns:
        The module that takes their place.

    Raises:
        ConfigError: the embeddings are trained, tied or of an unknown kind, or several
            processes share the model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
        >>> keep_embeddings_on_host(model.requires_grad_(False))
        HostEmbedding(32, 64, in host memory)
    """
    old = model.get_input_embeddings()
    if isinstance(old, HostEmbedding):
        return old
    reason = _why_not(model, old)
    if reason is not None:
        raise ConfigError(
            f"the embeddings of {type(model).__name__} cannot stay in host memory: {reason}. Set "
            "model.embeddings_on_host to false."
        )
    new = HostEmbedding(old.get_parameter("weight"), getattr(old, "embed_scale", None))
    model.set_input_embeddings(new)
    return new


def has_host_embeddings(model: nn.Module) -> bool:
    """Whether some of a model's embeddings are in host memory.

    Args:
        model: any.

    Returns:
        True if a lookup waits for the token ids.

    Example:
        >>> has_host_embeddings(nn.Embedding(2, 2))
        False
    """
    return any(isinstance(module, HostEmbedding) for module in model.modules())


def _why_not(model: PreTrainedModel, old: nn.Module) -> str | None:
    """A phrase for a message, or None."""
    known = isinstance(old, nn.Embedding) and old.max_norm is None
    scaled = isinstance(getattr(old, "embed_scale", None), Tensor)
    if not known or not (scaled or type(old).forward is nn.Embedding.forward):
        return f"they are a {type(old).__name__}"
    weight = old.get_parameter("weight")
    if weight.requires_grad:
        return "they are trained"
    if getattr(model.get_output_embeddings(), "weight", None) is weight:
        return "they are also the weight of the head, which needs them on the GPU"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "several processes share the model"
    return None
