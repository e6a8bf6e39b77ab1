"""What layers keep: the same bits under every policy, and exactly the bytes of the arithmetic."""

import gc
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.block.install import fuse_blocks
from qlora_kit.block.policy import POLICIES
from qlora_kit.core.errors import ConfigError
from tests import tiny_models
from tests.block.helpers import (
    FAMILIES,
    METHODS,
    Gradients,
    counted,
    loss_and_gradients,
    make,
    maskless,
)

MIXTURES = ("save:1,recompute_all", "offload:1,save:1", "recompute_mlp:1,offload_attention")


def all_equal(a: Gradients, b: Gradients) -> bool:
    """Whether two sets of gradients have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_gives_the_same_bits(family: str, method: str) -> None:
    """Mixtures too, and a change of policy between steps or between forward and backward."""
    model, _ = make(family, METHODS[method], dtype=torch.bfloat16, nf4=family == "llama")
    fused = fuse_blocks(model, "save", deterministic=True)
    with counted(fused) as ran:
        loss, wanted = loss_and_gradients(model, **maskless())
        assert all(gradient.any() for gradient in wanted.values())
        for policy in (*POLICIES[1:], *MIXTURES):
            fused.set_policy(policy)
            again, found = loss_and_gradients(model, **maskless())
            assert torch.equal(again, loss), policy
            assert all_equal(found, wanted), policy
    assert ran == [0, 1] * (len(POLICIES) + len(MIXTURES))


@pytest.mark.parametrize(("first", "then"), [("save", "recompute_all"), ("recompute_all", "save")])
def test_a_policy_counts_from_the_next_forward_pass(first: str, then: str) -> None:
    """A backward pass under way goes by what its forward pass kept."""
    model, _ = make(dtype=torch.float32)
    fused = fuse_blocks(model, first)
    _, wanted = loss_and_gradients(model, **maskless())
    model.zero_grad()
    ids = tiny_models.tokens(2, 70)
    loss = model(input_ids=ids, labels=ids, **maskless()).loss
    fused.set_policy(then)
    assert fused.policies == (then, then)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all_equal(found, wanted)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("policy", ["recompute_elementwise", "recompute_all"])
def test_weights_that_stay_decoded_give_the_same_bits(family: str, policy: str) -> None:
    """Of some layers, of all, of none again; adapters change in between as in training."""
    found: list[Gradients] = []
    for decoded in (None, (1, 2, 0)):
        model, adapter = make(family, dtype=torch.float32, nf4=True)
        fused = fuse_blocks(model, policy)
        for step in range(3):
            if decoded is not None:
                fused.keep_decoded(decoded[step], torch.float32)
            found.append(loss_and_gradients(model, **maskless())[1])
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.mul_(1.1)
    for step in range(3):
        assert all_equal(found[3 + step], found[step]), step
    assert not all_equal(found[1], found[0])


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the bytes of a layer follow from. Ranks are those of q, k, v | o | gate, up | down."""

    hidden: int
    queries: int
    keys: int
    ffn: int
    heads: int
    ranks: tuple[int, int, int, int] = (0, 0, 0, 0)
    normed_heads: bool = False
    norms_behind: bool = False

    def per_token(self, policy: str, *, frozen_a: bool, itemsize: int = 2) -> int:
        """Bytes kept per token and layer.

        Args:
            policy: what to keep.
            frozen_a: LoRA-FA.
            itemsize: of the model's dtype.
        """
        if policy.startswith("offload"):
            return 0
        if policy == "recompute_all":
            return itemsize * self.hidden
        of_qkv, of_o, of_gate_up, of_down = self.ranks
        columns = 2 * self.hidden  # x and h
        columns += 2 * self.queries + 2 * self.keys  # q, attention's output, k, v
        columns += of_qkv + of_o  # X·Aᵀ
        if self.normed_heads:
            columns += self.queries + 2 * self.keys  # q, k, v as projected
        if self.norms_behind:
            columns += self.hidden  # what the norm behind attention reads
        if policy != "recompute_mlp":
            columns += 2 * self.ffn  # gate, up
            columns += of_gate_up + of_down  # X·Aᵀ
            columns += of_gate_up  # room for dY·B beside gate and up
            columns += self.hidden * self.norms_behind
        if policy == "save" and not frozen_a:  # normed x, normed h, activation, each with X·Aᵀ
            columns += 2 * self.hidden + self.ffn + of_qkv + of_gate_up + of_down
        return itemsize * columns + 4 * self.heads  # one float32 logsumexp per query


def test_the_arithmetic_is_that_of_the_design() -> None:
    """94 KB per token and layer of Llama-3.1-8B, before adapters and logsumexp."""
    sizes = Sizes(hidden=4096, queries=4096, keys=1024, ffn=14336, heads=32)
    found = sizes.per_token("recompute_elementwise", frozen_a=False) - 4 * 32
    assert found == 2 * (4 * 4096 + 2 * 1024 + 2 * 14336) == 94_208


RANKS = {"q_proj": 3, "k_proj": 8, "v_proj": 9, "o_proj": 16, "gate_proj": 1, "up_proj": 24}
_LIKE_LLAMA = Sizes(hidden=64, queries=128, keys=64, ffn=192, heads=4, ranks=(32, 16, 32, 8))
TINY = {
    "llama": _LIKE_LLAMA,
    "mistral": _LIKE_LLAMA,
    "qwen2": _LIKE_LLAMA,
    "qwen3": replace(_LIKE_LLAMA, normed_heads=True),
    "gemma2": replace(_LIKE_LLAMA, norms_behind=True),
    "gemma3": replace(_LIKE_LLAMA, normed_heads=True, norms_behind=True),
    # q, k and v are one linear of rank 4, gate and up are another
    "phi3": replace(_LIKE_LLAMA, ranks=(8, 16, 8, 8)),
}
"""Tiny models with sizes that cannot be taken for one another."""

SHAPE = (2, 33)


Input = tuple[Tensor, tuple[Tensor, Tensor]]


def layer_input(model: nn.Module) -> Input:
    """Hidden states and rotary tables."""
    x = torch.randn(*SHAPE, 64, dtype=model.dtype, requires_grad=True) * 1.0
    kinds = ("sliding_attention",) if model.config.model_type.startswith("gemma3") else ()
    return x, model.model.rotary_emb(x, torch.arange(SHAPE[1])[None], *kinds)


def first_layer_keeps(model: nn.Module, given: Input) -> tuple[Tensor, list[Tensor]]:
    """Run the first layer.

    Returns:
        Its result, which holds the graph, and what was saved for the backward pass,
        parameters and rotary tables aside, one tensor per storage.
    """
    x, positions = given
    shared = {address(tensor) for tensor in (*model.parameters(), *positions)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if address(tensor) not in shared:
            saved[address(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.model.layers[0](x, attention_mask=None, position_embeddings=positions)
    return y, list(saved.values())


def address(tensor: Tensor) -> int:
    """Of the storage."""
    return tensor.untyped_storage().data_ptr()


def saved_bytes(model: nn.Module) -> int:
    """Bytes that the first layer keeps for its backward pass."""
    _, saved = first_layer_keeps(model, layer_input(model))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("method", [LoRA, LoRAFA])
@pytest.mark.parametrize("family", TINY)
def test_bytes_kept_per_layer(family: str, method: type[LoRA], base: str) -> None:
    """To the byte, by policy; and much less than the model's own code keeps."""
    config = method(rank=4, rank_pattern=RANKS, alpha=5.0)
    changes = {"head_dim": 32, "intermediate_size": 192}
    model, _ = make(family, config, dtype=torch.bfloat16, nf4=base == "nf4", **changes)
    if family != "gemma2":  # which has eager attention only, and its maps would decide
        model.set_attn_implementation("sdpa")
    own = saved_bytes(model)
    tokens = SHAPE[0] * SHAPE[1]
    fused = fuse_blocks(model)
    for policy in POLICIES:
        fused.set_policy(policy)
        wanted = tokens * TINY[family].per_token(policy, frozen_a=method is LoRAFA)
        assert saved_bytes(model) == wanted, policy
    fused.set_policy("recompute_elementwise")
    assert saved_bytes(model) < 0.8 * own
    fused.set_policy("save")
    assert saved_bytes(model) < 0.9 * own


@pytest.mark.parametrize("family", TINY)
def test_bytes_kept_in_tiles(family: str) -> None:
    """The same, but for the room beside q, k and v that their gradient is written over."""
    config = LoRA(rank=4, rank_pattern=RANKS, alpha=5.0)
    changes = {"head_dim": 32, "intermediate_size": 192}
    model, _ = make(family, config, dtype=torch.bfloat16, **changes)
    fused = fuse_blocks(model, tile=16)
    sizes, tokens = TINY[family], SHAPE[0] * SHAPE[1]
    for policy in POLICIES:
        fused.set_policy(policy)
        wanted = sizes.per_token(policy, frozen_a=False)
        if policy in ("save", "recompute_elementwise", "recompute_mlp"):
            wanted += 2 * sizes.ranks[0] * (1 + sizes.normed_heads)
        assert saved_bytes(model) == tokens * wanted, policy


@pytest.mark.parametrize("policy", [p for p in POLICIES if not p.startswith("offload")])
def test_nothing_is_kept_beside(policy: str) -> None:
    """No tensor hangs on the graph's nodes that hooks on saved tensors would not see."""
    model, _ = make(dtype=torch.bfloat16)
    model.set_attn_implementation("sdpa")
    fuse_blocks(model, policy)

    def alive() -> set[int]:
        gc.collect()
        return {address(t) for t in gc.get_objects() if type(t) is Tensor and t.numel()}

    given = layer_input(model)
    first_layer_keeps(model, given)  # adapters are rounded into memory of their own, once
    before = alive()
    y, saved = first_layer_keeps(model, given)
    assert alive() - before <= {address(tensor) for tensor in (y, *saved)}


def test_unadapted_layers_keep_no_more_than_the_gradient_of_their_input_needs() -> None:
    """A layer without adapters keeps no X·Aᵀ and no normed input, whatever the policy."""
    config = LoRA(rank=4, alpha=5.0, targets=(r"re:.*layers\.1\..*proj",))
    changes = {"head_dim": 32, "intermediate_size": 192}
    model, _ = make("llama", config, dtype=torch.bfloat16, **changes)
    model.set_attn_implementation("sdpa")
    bare = Sizes(hidden=64, queries=128, keys=64, ffn=192, heads=4)
    fuse_blocks(model, "save")
    wanted = bare.per_token("recompute_elementwise", frozen_a=False)
    assert saved_bytes(model) == SHAPE[0] * SHAPE[1] * wanted


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "recompute_all"])
def test_a_second_backward_pass_is_refused(policy: str) -> None:
    """Buffers were written over: wrong numbers would be the alternative."""
    model, _ = make(dtype=torch.float32)
    fuse_blocks(model, policy)
    ids = tiny_models.tokens(2, 70)
    loss = model(input_ids=ids, labels=ids, **maskless()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_a_second_backward_pass_from_inputs_alone() -> None:
    """Under `recompute_all` nothing is written over, and the gradients are the same again."""
    model, _ = make(dtype=torch.float32)
    fuse_blocks(model, "recompute_all")
    _, wanted = loss_and_gradients(model, **maskless())
    model.zero_grad()
    ids = tiny_models.tokens(2, 70)
    loss = model(input_ids=ids, labels=ids, **maskless()).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all_equal(found, wanted)


def test_set_policy_refuses_what_does_not_fit() -> None:
    """And leaves the old policy in force."""
    model, _ = make()
    fused = fuse_blocks(model, "save")
    with pytest.raises(ConfigError, match="for 3 layers, and the model has 2"):
        fused.set_policy("save:3")
    assert fused.policies == ("save", "save")
