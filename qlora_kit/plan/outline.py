"""A model without memory: built from its configuration, quantized, adapted, ready for a step.

Everything is done by the code that does it to real models, on the meta device, so the
outline has the modules, parameters and layers of the run, and no weight.
"""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_kit.adapters.adalora.layer import AdaLoRALinear
from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.inject import attach
from qlora_kit.block.install import FusedBlocks, fuse_blocks, why_not_fused
from qlora_kit.block.tiles import tile_tokens
from qlora_kit.core.errors import ConfigError
from qlora_kit.nn.host_embedding import HostEmbedding, keep_embeddings_on_host
from qlora_kit.nn.swap import nf4_modules, quantizable, swap
from qlora_kit.ops.attention.transformers_door import register
from qlora_kit.plan.own_code import OwnCode
from qlora_kit.plan.setup import FULL, PREFIX, Setup
from qlora_kit.plan.trace import counted_bytes


@dataclass(slots=True)
class Outline:
    """A model on the meta device."""

    model: PreTrainedModel
    adapter: AttachedAdapter | None
    """None where everything is trained."""
    blocks: FusedBlocks | None
    """None where the model runs its own code."""
    own_code: AbstractContextManager[object]
    """What that code has to run under; nothing where layers run as one step each."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that get a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def adalora(self) -> list[AdaLoRALinear]:
        """Pieces whose ranks follow a budget; none with other methods."""
        pieces = () if self.adapter is None else self.adapter.pieces
        return [piece for piece in pieces if isinstance(piece, AdaLoRALinear)]

    @property
    def kept(self) -> list[Tensor]:
        """Weights that stay decoded from step to step."""
        return [] if self.blocks is None else self.blocks.kept_decoded()


def outline(config: PreTrainedConfig, setup: Setup) -> Outline:
    """Build a model without memory.

    Args:
        config: of a causal language model.
        setup: of the run.

    Returns:
        The model, in training mode, its layers prepared.

    Raises:
        ConfigError: the configuration is of no causal language model, or the policy does not
            fit the model's layers.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        >>> len(outline(config, Setup(rank=8)).trained)
        14
    """
    dtype = getattr(torch, setup.dtype)
    master = torch.float32 if setup.method == FULL and setup.mixed else dtype
    model = _empty(config, master)
    if setup.bits == 4:
        names = quantizable(model, setup.quant)
        swap(model, dict.fromkeys(names, setup.quant), dtype=dtype)
    adapter = None
    if setup.adapter is not None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        adapter = attach(model, setup.adapter, seed=0)
    if setup.embeddings_on_host:
        keep_embeddings_on_host(model)
    model.train()
    if setup.method != PREFIX:  # which has attention of its own
        model.set_attn_implementation(register())
    blocks = None
    own_code: AbstractContextManager[object] = OwnCode(setup)
    if setup.step == "fused" and why_not_fused(model) is None:
        blocks = fuse_blocks(model, setup.activations, tile=tile_tokens(setup.tile))
        if setup.keep_decoded and setup.bits == 4:
            blocks.keep_decoded(setup.keep_decoded, dtype)
        if setup.method != FULL:  # no autocast, and no mask: each call would be seen for nothing
            own_code = nullcontext()
    elif setup.activations in ("recompute_all", "offload"):
        checkpointing(model, own_code)
    return Outline(model, adapter, blocks, own_code)


def checkpointing(model: PreTrainedModel, own_code: AbstractContextManager[object]) -> None:
    """Turn transformers' own recomputation on, by the name that this version has for it.

    Args:
        model: in training mode.
        own_code: what is computed again has to run under.
    """
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), own_code)}
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(options)


def _empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    except ValueError as error:
        kind = type(config).__name__
        raise ConfigError(f"a plan needs a causal language model; {kind} is none.") from error
    assert isinstance(model, PreTrainedModel)
    return model


_SCALES = ("absmax", "offset")
"""How the names of an NF4 weight's parameters end that are scales."""


def components(made: Outline) -> dict[str, int]:
    """Bytes that are there before the first step, by name.

    Args:
        made: an outline.

    Returns:
        `weights`, `scales`, `embeddings`, `head`, `norms`, `adapters`; zeros are left out.
        Memory that two modules share counts once, for the first: a tied head is part of the
        embeddings.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        >>> components(outline(config, Setup(rank=8)))["embeddings"]
        4096
    """
    model = made.model
    trained = {id(p) for p in made.trained} if made.adapter is not None else set()
    quantized = {module for _, module in nf4_modules(model)}
    ends = {id(model.get_input_embeddings()): "embeddings"}
    ends |= {id(model.get_output_embeddings()): "head"}
    found: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, HostEmbedding):
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if id(tensor) in trained:
                kind = "adapters"
            elif module in quantized:
                kind = "scales" if name.endswith(_SCALES) else "weights"
                kind = "norms" if name == "bias" else kind
            elif id(module) in ends:
                kind = ends[id(module)]
            else:
                kind = "weights" if tensor.dim() > 1 else "norms"
            found[kind] = found.get(kind, 0) + counted_bytes(tensor.numel() * tensor.element_size())
    kept = sum(counted_bytes(t.numel() * t.element_size()) for t in made.kept)
    return found | {"decoded weights": kept} if kept else found
