"""`attn_implementation="qlora_kit"` on tiny models: packed rows, caches, padding, waits."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening, masking_utils

from qlora_kit.core.errors import BackendError
from qlora_kit.ops.attention import transformers_door as door
from qlora_kit.ops.attention.rule import Documents
from tests.tiny_models import build, tokens

pytestmark = pytest.mark.transformers_compat

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
LENGTHS = [7, 12, 3, 10]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "mixtral"]
FAMILIES += ["qwen3_moe", "gpt2"]
WINDOWED = ("mistral", "gemma2", "gemma3", "phi3", "mixtral")
BOUND = 64 * 2**-23
"""Relative, of float32 models of two layers: some tens of roundings one after the other."""


def make(family, device="cpu", **changes):
    """A tiny model under our name; windows are shorter than the documents."""
    window = {"sliding_window": 5} if family in WINDOWED else {}
    model = build(family, **window | changes).to(device)
    model.set_attn_implementation(door.register())
    return model


def reference(model):
    """What the same model is compared to: `sdpa`, or `eager` where it lacks something."""
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    model.set_attn_implementation("sdpa" if softcap is None else "eager")


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def packed(device="cpu", rows=1):
    """Token ids and positions of all documents, and each document's tokens."""
    parts = [tokens(1, n, seed=n) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).view(rows, -1)
    documents = Documents.from_positions(positions).to(device)
    ids = torch.cat(parts, 1).view(rows, -1)
    return ids.to(device), positions.to(device), documents, [part.to(device) for part in parts]


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(family, device):
    model = make(family, device)
    ids, positions, documents, parts = packed(device)
    reference(model)
    wanted = torch.cat([model(part).logits for part in parts], 1)
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    wanted_gradients = gradients(model)

    model.set_attn_implementation("qlora_kit")
    arguments = {"position_ids": positions, "use_cache": False}
    got = model(ids, **arguments, **door.packed_inputs(documents)).logits
    (got * weights).sum().backward()
    assert relative(got, wanted) < BOUND
    for name, gradient in gradients(model).items():
        assert relative(gradient, wanted_gradients[name]) < 4 * BOUND, name
    crossing = model(ids, **arguments, **door.unpadded_inputs()).logits  # sees its neighbours
    assert relative(crossing, wanted) > 1000 * BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_several_rows(family):
    """Documents are counted over all rows."""
    model = make(family)
    ids = tokens(2, 16, seed=1)
    positions = torch.tensor([[*range(7), *range(9)], [*range(11), *range(5)]])
    inputs = door.packed_inputs(Documents.from_positions(positions))
    got = model(ids, position_ids=positions, use_cache=False, **inputs).logits
    reference(model)
    alone = [
        model(part).logits
        for row, at in ((0, 7), (1, 11))
        for part in (ids[row : row + 1, :at], ids[row : row + 1, at:])
    ]
    assert relative(got.view(1, 32, -1), torch.cat(alone, 1)) < BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_is_as_before(family):
    """Generation with a cache and left padding, right padding, evaluation: the same bits."""
    model = make(family)
    ids = tokens(2, 9)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :3] = 0
    right[0, -3:] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    found = []
    for ours in (True, False):
        if not ours:
            reference(model)
        with torch.no_grad():
            made = model.generate(ids, attention_mask=left, return_dict_in_generate=True, **options)
            logits = [model(ids, attention_mask=mask).logits for mask in (None, right)]
        logits.append(model(ids, attention_mask=right).logits)  # training on padded rows
        found.append((made.sequences, *made.logits, *logits))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral"])
def test_plain_rows_need_no_mask(family):
    """The marker, nothing, and right padding with the marker, where tokens count."""
    model = make(family)
    ids = tokens(2, 21)
    wanted = model(ids).logits
    got = model(ids, **door.unpadded_inputs()).logits
    assert relative(got, wanted) < BOUND
    short = ids[:, :15]
    assert relative(got[:, :15], model(short, **door.unpadded_inputs()).logits) < BOUND


class _Squares(TorchDispatchMode):
    """Collects the shapes of results as large as (T, T)."""

    def __init__(self, tokens_squared):
        super().__init__()
        self.limit, self.found = tokens_squared, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.limit:
            self.found.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "phi3"])
def test_no_mask_is_formed_and_positions_are_not_read(family, monkeypatch):
    model = make(family)
    rows = [{"input_ids": [5] * n} for n in [97] * 20]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    batch = collate(rows)  # transformers' own keywords
    batch.pop("labels")
    longest = int(batch["max_length_q"])
    assert longest == 97
    documents = Documents(batch["cu_seq_lens_q"].to(torch.int32), longest)
    ours = door.packed_inputs(documents)
    assert set(ours) - {"attention_mask"} <= set(batch)
    batch["max_length_q"] = batch["max_length_k"] = longest
    square = (97 * 20) ** 2
    with torch.no_grad(), _Squares(square) as squares:
        masked = model(**batch, use_cache=False).logits
    assert squares.found  # without the marker there is one: the test sees it

    def read(_positions):
        raise AssertionError("positions were searched, which waits for the GPU")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", read)
    with _Squares(square) as squares:
        got = model(**batch | ours, use_cache=False).logits
        got.sum().backward()
    assert not squares.found
    assert relative(got, masked) < BOUND


def test_an_implementation_that_does_not_know_the_marker_fails_loudly():
    model = make("llama")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model(tokens(1, 9), **door.unpadded_inputs()).logits.isnan().all()


def test_what_cannot_be_served_is_refused():
    ids, positions, documents, _ = packed()
    inputs = {"position_ids": positions, "use_cache": False} | door.packed_inputs(documents)
    dropping = make("llama", attention_dropout=0.1).train()
    with pytest.raises(BackendError, match="attention_dropout"):
        dropping(ids, **inputs)
    dropping(ids)  # sdpa serves what our kernels do not
    model = make("llama")
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(BackendError, match="keys of a cache"):
        model(ids, past_key_values=cache, **door.unpadded_inputs())
    with pytest.raises(BackendError, match="not causal"):
        model(ids, is_causal=False, **door.unpadded_inputs())
    with pytest.raises(BackendError, match="sinks"):
        model(ids, s_aux=torch.zeros(4))


def test_a_layer_that_does_not_tell_its_window_is_refused():
    """Its mask would have had it."""
    model = make("gemma3")
    ids = tokens(1, 9)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    model(ids)
    if any(layer.self_attn.layer_type != "full_attention" for layer in model.model.layers):
        with pytest.raises(BackendError, match="does not tell how far"):
            model(ids, **door.unpadded_inputs())
    llama = make("llama")
    llama.config.attention_chunk_size = 4
    with pytest.raises(BackendError, match="does not tell how far"):
        llama(ids, **door.unpadded_inputs())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_compile_whole_and_once(family):
    """No graph break, and one graph for all layers of a kind."""
    ids, positions, documents, _ = packed()
    inputs = {"position_ids": positions, "use_cache": False} | door.packed_inputs(documents)
    deeper = {"num_hidden_layers": 4}
    if family == "gemma2":
        deeper["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model = make(family, **deeper).train()
    wanted = model(ids, **inputs).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    got = model(ids, **inputs).logits
    assert torch.equal(got, wanted)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (2 if family == "gemma2" else 1)


def test_the_softcap_is_kept_where_sdpa_drops_it():
    """Under a cache or a mask, where `sdpa` has none."""
    model = make("gemma2", attn_logit_softcapping=0.5)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        assert torch.equal(got, model(ids, attention_mask=mask).logits)
        if Version(transformers.__version__) < Version("5.18"):
            model.set_attn_implementation("sdpa")
            assert relative(model(ids, attention_mask=mask).logits, got) > 1000 * BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("packing", [True, False])
def test_nothing_waits_for_the_gpu(family, packing):
    model = make(family, "cuda", head_dim=16).to(torch.bfloat16)
    ids, positions, documents, _ = packed("cuda")
    inputs = door.packed_inputs(documents) if packing else door.unpadded_inputs()
    inputs |= {"position_ids": positions, "use_cache": False}
    inputs["attention_mask"] = inputs["attention_mask"].cuda()
    for _ in range(2):
        model(ids, **inputs).logits.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, **inputs).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_under_autocast_attention_gets_one_dtype():
    """Rotary embeddings leave queries and keys in float32, and values are in 16 bits."""
    model = build("llama").train()
    ids = tokens(rows=2, length=9)
    wanted = model(ids, use_cache=False).logits
    model.set_attn_implementation(door.register())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, use_cache=False, **door.unpadded_inputs()).logits
    found.sum().backward()
    assert (found - wanted).norm() < 0.05 * wanted.norm()
