"""Input embeddings in host memory: the GPU reads the rows that a batch needs over the link.

A step reads a few rows of the table and never multiplies by it, but on the GPU it takes as much
memory as the head: 1 GiB in an 8B model, 2 in a 70B one. Here it stays in host memory, in its own
dtype, bit for bit. At the first lookup from an NVIDIA GPU it moves to page-locked memory, which a
kernel reads by itself (`ops/gather_rows`): 8 KiB a token for an 8B model. Nothing waits, so such
steps are recorded as CUDA graphs like others.

Where that cannot be (no kernels, memory that the system does not lock, rows that are no multiple of
16 bytes) a lookup waits for the token ids to be on the CPU and sends the rows, 16,384 at a time
through pinned memory: that costs short steps the lead of the host, and they are not recorded.

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
from qlora_kit.core.log import log_once
from qlora_kit.core.pinned import pinned_copy
from qlora_kit.ops.gather_rows.cuda import is_readable
from qlora_kit.ops.gather_rows.op import gather_rows, never_waits

ROWS_AT_A_TIME = 16384
"""Of the pinned memory that rows are sent through: 128 MiB for 4,096 values in 16 bits."""


class HostEmbedding(nn.Module):
    """A frozen table of embeddings in host memory.

    Attributes:
        weight: (V, H), on the CPU (on the meta device if it was there); another tensor, of the
            same values, once a GPU has looked rows up.

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
        self._refused = False
        kept = weight.detach()
        if not kept.is_meta:
            locked = self._locked(kept) if never_waits(kept, kept) else None
            kept = kept.to("cpu") if locked is None else locked
        self.register_buffer("weight", kept)
        self.scale = None if scale is None else scale.detach().to("cpu")

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up.

        Args:
            ids: any shape, int64, on any device.

        Returns:
            (*ids.shape, H) on that device. Ids outside of [0, V) raise IndexError, or give rows
            of NaN where the lookup does not wait.
        """
        if ids.device == self.weight.device:
            found = F.embedding(ids, self.weight)
        elif self.waits(ids):
            found = self._send(ids)
        else:
            found = gather_rows(self.weight, ids.long())
        if self.scale is not None:  # rounded to the table's dtype first, as models do
            found = found * self.scale.to(self.weight.dtype).item()
        return found

    def waits(self, like: Tensor) -> bool:
        """Tell whether lookups from a device wait for the ids to be on the CPU.

        If they need not, the table is moved to page-locked memory, where it is not there yet.

        Args:
            like: on the device of the ids.

        Returns:
            True on all but NVIDIA GPUs, and where the table cannot be locked or its rows are no
            multiple of 16 bytes.
        """
        if not never_waits(self.weight, like):
            return True
        if is_readable(self.weight):
            return False
        if self._refused or torch.cuda.is_current_stream_capturing():
            return True
        locked = self._locked(self.weight)
        if locked is not None:
            self.weight = locked
        return locked is None

    def _locked(self, table: Tensor) -> Tensor | None:
        """A copy in page-locked memory; None, for good, where the system refuses."""
        try:
            with torch.inference_mode(False), torch.no_grad():  # it outlives this lookup
                return pinned_copy(table)
        except (RuntimeError, OSError) as error:
            self._refused = True
            log_once(
                "lookups of embeddings in host memory wait for the token ids: their memory could "
                f"not be page-locked ({str(error).splitlines()[0] if str(error) else error!r})."
            )
            return None

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


def lookup_waits(model: nn.Module) -> bool:
    """Tell whether a model's lookups of embeddings wait for the token ids to be on the CPU.

    Args:
        model: where it will run, which its first parameter says. Embeddings in host memory move to
            page-locked memory if that lets a GPU read them.

    Returns:
        True if some are in host memory, and not read by a GPU.

    Example:
        >>> lookup_waits(nn.Embedding(2, 2))
        False
    """
    tables = [module for module in model.modules() if isinstance(module, HostEmbedding)]
    like = next(model.parameters(), None)
    return any(like is None or table.waits(like) for table in tables)


def base_dtype(model: PreTrainedModel) -> torch.dtype:
    """What a model was loaded in, wherever its embeddings are.

    Transformers says the dtype of the first parameter. With embeddings in host memory, which are
    none, that is an adapter's float32.

    Args:
        model: with or without an adapter.

    Returns:
        The dtype of its first parameter or of the table in host memory, which would be first.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> base_dtype(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16)))
        torch.float32
    """
    for module in model.modules():
        if isinstance(module, HostEmbedding):
            return module.weight.dtype
    return model.dtype


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
