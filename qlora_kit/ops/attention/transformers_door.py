"""`attn_implementation="qlora_kit"`: our attention through transformers' own extension points.

`AttentionInterface` and `AttentionMaskInterface` are transformers' registries of attention
functions and of what makes their masks. We register one name in both. A model under that name
trains on packed rows without ever forming a (T, T) mask, and in everything else (generation
with a cache, left padding, evaluation) computes what `sdpa` computes, by the same function;
with a softcap, which `sdpa` lacks, what `eager` computes. (In 5.17 `sdpa` drops Gemma 2's
softcap in silence; from 5.23 on it refuses that model.)

What transformers does with masks, read in 5.17 and 5.23 (masking_utils.py, and the models
Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma 2 and 3, Phi, Phi 3, GPT-2):

- A model calls `create_causal_mask`, and `create_sliding_window_causal_mask` if it has
  windows, once per forward, before its layers. Position ids are always there by then: the
  model makes them if the caller did not.
- Without a 2-D mask and a cache, both look for packed documents in the position ids:
  `(diff != 1).cumsum`, and an `.all()` that makes the host wait for the GPU, packed or not.
  If there are any, the registered mask function makes (B, 1, T, T) booleans. `cu_seq_lens_q`
  is not looked at: these keywords go past the masks, down to the attention function.
- With a 2-D mask, `sdpa`'s mask function asks whether it is all ones: another wait.
- A **4-D mask is returned as it is**, by both functions, before any of that: transformers
  takes it for one the caller has prepared. It is not looked at, not moved and not expanded,
  and models with two kinds of mask hand it to every layer. (A dictionary of masks by layer
  type goes past them as well, but Llama, Mistral and Phi 3 take none.)

So the caller who knows where the documents are says both things: `cu_seq_lens_q` and
`max_length_q` as for FlashAttention, and as attention mask a *marker* of shape (1, 1, 1, 1),
which means that nothing is hidden but by causality, the layer's window and the documents.
`packed_inputs` and `unpadded_inputs` make these. No wait and no mask is left. Rows padded on
the right need no mask either: nothing before the padding sees it, and its labels are ignored.

The marker is one NaN. An attention function that does not know it refuses it or gives NaN:
a loud error, where a True or a 0 would have let every token see the future.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_kit.core.errors import BackendError
from qlora_kit.core.log import log_once
from qlora_kit.ops.attention.op import attention
from qlora_kit.ops.attention.rule import AttentionRule, Documents
from qlora_kit.ops.autocast import autocast_dtype

NAME = "qlora_kit"
"""What models are told as `attn_implementation`."""

_MARKER_SHAPE = (1, 1, 1, 1)


def register() -> str:
    """Make the name known to transformers. Doing it again changes nothing.

    Returns:
        The name, for `attn_implementation=` and `model.set_attn_implementation`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> model.set_attn_implementation(register())
        >>> model.config._attn_implementation
        'qlora_kit'
    """
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def unpadded_inputs() -> dict[str, Any]:
    """Arguments of a model's forward for rows of one document, padded on the right if at all.

    Returns:
        `attention_mask`, the marker, on the CPU.

    Example:
        >>> unpadded_inputs()["attention_mask"].shape
        torch.Size([1, 1, 1, 1])
    """
    return {"attention_mask": torch.full(_MARKER_SHAPE, float("nan"))}


def is_marker(mask: Tensor | None) -> bool:
    """Whether an attention mask is the marker: nothing is hidden but by causality and windows.

    Args:
        mask: of a model's or a layer's forward.

    Returns:
        True also for the only real mask of its shape, that of one token, which hides as little.

    Example:
        >>> is_marker(unpadded_inputs()["attention_mask"]), is_marker(None)
        (True, False)
    """
    return mask is not None and tuple(mask.shape) == _MARKER_SHAPE


def packed_inputs(documents: Documents) -> dict[str, Any]:
    """Arguments of a model's forward for packed rows, beside input_ids and position_ids.

    Args:
        documents: where they start, counted over the whole batch.

    Returns:
        `attention_mask`, the marker, and transformers' FlashAttentionKwargs.

    Example:
        >>> documents = Documents.from_positions(torch.tensor([[0, 1, 0, 1, 2]]))
        >>> packed_inputs(documents)["cu_seq_lens_q"].tolist()
        [0, 2, 5]
    """
    return unpadded_inputs() | {
        "cu_seq_lens_q": documents.starts,
        "cu_seq_lens_k": documents.starts,
        "max_length_q": documents.longest,
        "max_length_k": documents.longest,
    }


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers' `AttentionInterface` has it.

    Args:
        module: the attention layer; its `config`, `layer_idx` and `is_causal` are read.
        query: (B, Hq, T, D).
        key: (B, Hk, S, D), S above T with a cache.
        value: (B, Hk, S, D).
        attention_mask: None for causal, the marker, or (B, 1, T, S) booleans.
        dropout: probability; our kernels have none.
        scaling: factor on the scores, None for 1/√D.
        sliding_window: how many tokens a query sees.
        softcap: c in c·tanh(score/c).
        is_causal: None for what the module says.
        position_bias: added to the scores; `sdpa`'s.
        s_aux: attention sinks; not supported.
        cu_seq_lens_q: (n + 1,) the documents' starts over the whole batch.
        max_length_q: tokens of the longest one.
        **others: what the model passes besides. transformers' contract, handed on to `sdpa`.

    Returns:
        (B, T, Hq, D), contiguous; None for the weights.

    Raises:
        BackendError: documents or the marker were given to a layer we cannot serve.
    """
    if s_aux is not None:
        raise BackendError(
            f"attn_implementation={NAME!r} has no attention sinks, which "
            f"{type(module).__name__} needs. Load this model with attn_implementation='eager'."
        )
    marked = is_marker(attention_mask)
    packed = cu_seq_lens_q is not None and max_length_q is not None
    asked = marked or (packed and attention_mask is None)
    if asked or (attention_mask is None and query.requires_grad):
        reason = _refuses(module, query, key, value, dropout, is_causal, position_bias)
        if reason is None:
            _check_window(module, sliding_window, marked)
            rule = AttentionRule(
                scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
                window=sliding_window,
                softcap=softcap,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
            documents = _documents(cu_seq_lens_q, max_length_q) if packed else None
            q, k, v = (_by_token(tensor) for tensor in (query, key, value))
            return attention(q, k, v, rule, documents), None
        if asked:
            raise BackendError(
                f"attn_implementation={NAME!r} cannot train {type(module).__name__} on these "
                f"inputs: {reason}. Pass an ordinary attention mask, or unpacked rows."
            )
    if packed:
        log_once("attention: a (T, T) mask was made although documents were given; packed_inputs()")
    if softcap is not None:
        return _eager(query, key, value, attention_mask, dropout, scaling, softcap), None
    done = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
        **others,
    )
    return done[0], None


def _by_token(heads: Tensor) -> Tensor:
    """(B, T, H, D) of (B, H, T, D); autocast, under which rotary leaves float32, is heeded."""
    dtype = autocast_dtype(heads.device)
    return (heads if dtype is None else heads.to(dtype)).transpose(1, 2)


def _refuses(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    is_causal: bool | None,
    position_bias: Tensor | None,
) -> str | None:
    """Why our attention cannot serve a layer, or None."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        return "it is not causal"
    if query.shape[2] != key.shape[2]:
        return "there are keys of a cache"
    if value.shape[-1] != key.shape[-1]:
        return "its values are not as wide as its keys"
    if dropout:
        return "it drops attention weights; set attention_dropout to 0"
    if position_bias is not None:
        return "it adds a bias to the scores"
    return None


def _check_window(module: nn.Module, window: int | None, marked: bool) -> None:
    """With the marker no mask has a layer's window: the layer has to tell it.

    A few models (PhiMoE, Qwen2-MoE, Llama 4) leave windows and chunks to the mask. The layer's
    index is not read: a compiled layer would be compiled once for each.
    """
    if window is not None or not marked:
        return
    config = getattr(module, "config", None)
    kind = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
    local = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    hidden = kind != "full_attention" if kind is not None else local is not None
    if hidden:
        raise BackendError(
            f"attn_implementation={NAME!r}: {type(module).__name__} does not tell how far its "
            f"window ({kind or local}) reaches. Pass this model an ordinary attention mask."
        )


def _documents(starts: Tensor | None, longest: int | None) -> Documents:
    assert starts is not None
    assert longest is not None
    return Documents(starts.to(torch.int32), int(longest))


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention with a softcap under any mask, all scores at once: (B, T, Hq, D)."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.mT * scale / softcap) * softcap
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout)
    return (weights @ value).transpose(1, 2).contiguous()
