"""What a layer holds at its worst moments on long rows, counted on the meta device.

In units of U, one (M, H) matrix in 16 bits, for an 8B model's layers: H = 4,096, 32 heads, 8 key
heads, width 14,336, rank 32. Queries take 1 U, keys and values 1/4 each, all of it 1.5 U.

    forward, projections      x, the last layer's x on its way out, q k v                      3.5
    forward, in attention     x, q k v, its result                                             3.5
    forward, behind it        x, attention's result, h                                         3
    backward, recomputation   x (becoming h), q k v, attention's result, gradient of y         4.5
    backward, feed-forward    q k v, attention's result, h, gradient of h (over that of y)     4.5
    backward, attention       q k v (becoming their gradient), its result, gradient of h       3.5
                              of one group of 8: gradients of its result, of q, of k and v     2.5/8
                              x once more, on its way back during the last group               1
    backward, projections     x, gradient of q k v, gradient of h (becoming that of x)         3.5

Beside these: rotary tables, logsumexps, X·Aᵀ and the room for dY·B, 256 values a token or less
each; one group of weights decoded; and one tile. Kernels' own workspaces are not counted here.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.block.install import FusedBlocks, fuse_blocks
from qlora_kit.nn.swap import quantizable, swap
from qlora_kit.ops.attention.transformers_door import register, unpadded_inputs
from qlora_kit.quant.config import QuantConfig
from qlora_kit.step.prepare import fused_evaluation

H, WIDTH, RANK, HEADS = 4096, 14336, 32, 32
TOKENS, TILE = 200_000, 4096
UNIT = 2 * TOKENS * H
LAYERS = 4

IN_FORWARD = 3.5 + 1 / 8
"""The result of one group of heads is there before it joins the others."""

IN_BACKWARD = 4.5

TABLES = 2 * 2 * TOKENS * 128
"""Rotary cosines and sines."""

BESIDE = TABLES + 4 * TOKENS * HEADS + 2 * 2 * TOKENS * 4 * RANK
"""And logsumexps; X·Aᵀ of q, k, v and o, and as much room beside gradients."""

DECODED = 2 * ((2 * WIDTH + 2 * RANK) * (H + 2 * RANK) + (H + RANK) * (WIDTH + RANK))
"""Weights of the feed-forward."""

ONE_TILE = 2 * TILE * (2 * (WIDTH + RANK) + WIDTH + WIDTH + RANK + 2 * H)
"""Gate and up, the activation, its gradient, an input and a gradient, with their ranks."""


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors on the meta device as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.see(tensor)
        return result

    def see(self, tensor: Tensor, *, count: bool = True) -> None:
        """Take note of a tensor's memory; of what was there before without counting it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if count else 0
        if key not in self._known:
            self._known[key] = weakref.ref(storage, partial(self._gone, key, size))
            self.alive += size
            self.most = max(self.most, self.alive)

    def _gone(self, key: int, size: int, _reference: object) -> None:
        del self._known[key]
        self.alive -= size

    def peak(self) -> int:
        """The most since it was last asked."""
        most, self.most = self.most, self.alive
        return most


def build(policy: str, tile: int | None) -> tuple[PreTrainedModel, FusedBlocks]:
    """Layers of an 8B model without memory."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=H,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=TOKENS,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quant = QuantConfig()
    swap(model, dict.fromkeys(quantizable(model, quant), quant), dtype=torch.bfloat16)
    attach(model, LoRA(rank=RANK, alpha=2.0 * RANK), seed=0)
    model.train().set_attn_implementation(register())
    return model, fuse_blocks(model, policy, tile=tile)


def measure(policy: str, tile: int | None) -> dict[str, int]:
    """Peaks of the forward and the backward pass, in bytes.

    What the caller holds is left out: the embeddings, which a model keeps to the end of its
    forward pass, the result and its gradient.
    """
    model, _ = build(policy, tile)
    found: dict[str, int] = {}
    with Counted() as counted:
        x = torch.empty((1, TOKENS, H), dtype=torch.bfloat16, device="meta")
        for tensor in (*model.parameters(), *model.buffers()):
            counted.see(tensor, count=False)
        counted.peak()
        y = model.model(inputs_embeds=x, use_cache=False, **unpadded_inputs()).last_hidden_state
        found["forward"] = counted.peak() - UNIT
        del x
        y.backward(torch.empty_like(y))
        found["backward"] = counted.peak() - 2 * UNIT
    return found


@pytest.fixture(scope="module")
def lean() -> dict[str, int]:
    """Peaks with everything that saves memory."""
    return measure("offload", TILE)


def test_forward(lean: dict[str, int]) -> None:
    """What the table says, and no tenth of a U beside."""
    table = IN_FORWARD * UNIT + TABLES
    assert table <= lean["forward"] < table + UNIT // 10


def test_backward(lean: dict[str, int]) -> None:
    """Likewise; the feed-forward's moment is the worst, attention's lies below."""
    table = IN_BACKWARD * UNIT + BESIDE + DECODED + ONE_TILE
    assert table - UNIT // 10 < lean["backward"] < table + UNIT // 10


def test_without_tiles_it_is_several_times_as_much(lean: dict[str, int]) -> None:
    """Gate and up alone take 7 U."""
    whole = measure("offload", None)
    assert whole["forward"] > 3 * lean["forward"]
    assert whole["backward"] > 4 * lean["backward"]


def test_a_wider_tile_costs_its_width(lean: dict[str, int]) -> None:
    """Twice as many tokens a tile: one more tile's columns, nothing else."""
    double = measure("offload", 2 * TILE)
    assert abs(double["backward"] - lean["backward"] - ONE_TILE) < UNIT // 50
    assert double["forward"] == lean["forward"]


def test_inputs_kept_on_the_gpu_are_counted(lean: dict[str, int]) -> None:
    """Without offloading each layer's input stays; the last, and the embeddings, do anyway."""
    kept = measure("recompute_all", TILE)
    assert abs(kept["forward"] - lean["forward"] - (LAYERS - 2) * UNIT) < UNIT // 50


@pytest.mark.parametrize("disabled", [False, True])
def test_evaluation_takes_less_than_training(disabled: bool) -> None:
    """Fused for the purpose, adapters on or off: what a forward pass takes; own layers take more.

    A row that can be trained on can so be measured. The model's own layers would hold gate and up
    of all tokens, 7 U, and more.
    """
    model, fused = build("offload", TILE)
    fused.remove()
    model.eval()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.enabled = not disabled
    peaks = {}
    for step in ("fused", "eager"):
        with Counted() as counted, fused_evaluation(model, step, TILE), torch.no_grad():
            x = torch.empty((1, TOKENS, H), dtype=torch.bfloat16, device="meta")
            for tensor in (*model.parameters(), *model.buffers()):
                counted.see(tensor, count=False)
            counted.peak()
            model.model(inputs_embeds=x, use_cache=False, **unpadded_inputs())
            peaks[step] = counted.peak() - UNIT
    trained = measure("offload", TILE)
    assert peaks["fused"] < IN_FORWARD * UNIT + BESIDE + DECODED + ONE_TILE
    assert peaks["fused"] <= trained["forward"] < trained["backward"]
    assert peaks["eager"] > 7 * UNIT > trained["backward"]
