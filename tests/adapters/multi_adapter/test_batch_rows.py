"""A batch whose rows have different adapters, against one adapter at a time."""

import pytest
import torch
from torch import nn

from qlora_kit.adapters.inject import load_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.multi_adapter import batch_rows
from qlora_kit.adapters.multi_adapter.batch_rows import BatchRows, Mixed
from qlora_kit.adapters.multi_adapter.load import load_adapters
from qlora_kit.adapters.multi_adapter.pieces import SharedLinear
from qlora_kit.core.errors import AdapterError
from tests import tiny_models
from tests.adapters.multi_adapter.helpers import (
    FAMILIES,
    alone,
    answer,
    base,
    configs,
    folders,
    make,
    tolerance,
    variants,
)

FORMS = ("masked", "grouped", "auto")


@pytest.mark.transformers_compat
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_answered_by_its_own_adapter(family, bits, form, tmp_path):
    model = base(family, bits)
    paths = folders(model, configs(family) | variants(family), tmp_path)
    bank = load_adapters(model, paths)
    names = ["all", None, *variants(family), "all", "some", "half", None]
    ids = tiny_models.tokens(len(names), 9)
    with bank.rows(names, form=form):
        mixed = answer(model, ids)
    ones = torch.zeros_like(mixed)
    for row, name in enumerate(names):
        bank.use(name)
        ones[row] = answer(model, ids[row : row + 1])
    limit = tolerance(ones)
    assert (mixed - ones).abs().max() < limit
    with bank.rows([*names[1:], names[0]], form=form):  # everyone has a neighbour's adapter
        wrong = answer(model, ids)
    off = [float((wrong[i] - ones[i]).abs().max()) for i in range(len(names))]
    assert min(off) > 100 * limit


@pytest.mark.parametrize("bits", [4, 32])
def test_alike_rows_are_one_adapter_bit_for_bit(bits, tmp_path):
    model = base("llama", bits)
    paths = folders(model, configs("llama"), tmp_path)
    bank = load_adapters(model, paths)
    with bank.rows(["some", "some"]):
        assert torch.equal(answer(model), alone("llama", paths["some"], bits))
    with bank.rows([None, None]):
        assert torch.equal(answer(model), alone("llama", None, bits))
    bank.use("all")
    with bank.rows(["some", None]):
        pass
    assert torch.equal(answer(model), alone("llama", paths["all"], bits))  # as it was before


def test_a_base_row_in_a_mixed_batch_is_the_base_bit_for_bit(tmp_path):
    model = base("llama", 4)
    bank = load_adapters(model, folders(model, configs("llama"), tmp_path))
    ids = tiny_models.tokens(3)
    plain = answer(model, ids)
    for form in FORMS:
        with bank.rows(["all", None, "some"], form=form):
            assert torch.equal(answer(model, ids)[1], plain[1])


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("form", ["masked", "grouped"])
def test_rows_in_16_bits(bits, form, tmp_path):
    model = base("llama", bits, torch.bfloat16)
    bank = load_adapters(model, folders(model, configs("llama"), tmp_path))
    ids, names = tiny_models.tokens(4), ["half", "all", None, "some"]
    with bank.rows(names, form=form):
        mixed = answer(model, ids).float()
    off = {}
    for name in (*configs("llama"), None):
        bank.use(name)
        off[name] = (answer(model, ids).float() - mixed).norm(dim=(1, 2)) / mixed.norm(dim=(1, 2))
    for row, name in enumerate(names):
        own = float(off[name][row])
        assert own < 8 * 2.0**-8  # some ten roundings to 8 bits one after the other
        assert all(float(off[other][row]) > 4 * own for other in off if other != name)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("form", ["masked", "grouped"])
def test_rows_under_autocast(bits, form, tmp_path):
    model = base("llama", bits)
    paths = folders(model, configs("llama"), tmp_path)
    bank = load_adapters(model, paths)
    exact = {}
    for name in ("some", "all"):
        bank.use(name)
        exact[name] = answer(model)
    bank.use("some")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = answer(model)
        with bank.rows(["some", "all"], form=form):
            mixed = answer(model).float()
        fresh = base("llama", bits)
        load_adapter(fresh, paths["some"])
        assert torch.equal(one, answer(fresh))
    for row, name in enumerate(("some", "all")):
        off = {n: float((mixed[row] - e[row]).norm() / e[row].norm()) for n, e in exact.items()}
        assert off[name] < 8 * 2.0**-8
        assert sum(off.values()) > 5 * off[name]


@pytest.mark.transformers_compat
@pytest.mark.parametrize("form", ["masked", "grouped"])
@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("llama", 32), ("gpt2", 4)])
def test_generation_of_padded_rows_with_a_cache(family, bits, form, tmp_path):
    model = base(family, bits)
    bank = load_adapters(model, folders(model, configs(family), tmp_path))
    names, lengths = ["some", None, "all", "half", "all"], [3, 9, 7, 2, 5]
    prompts = [tiny_models.tokens(1, n, seed=n)[0] for n in lengths]
    ids = torch.zeros(5, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :] = prompt
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with bank.rows(names, form=form):
        mixed = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)[:, 9:]
    written = {}
    for name in {*names}:
        bank.use(name)
        for row, prompt in enumerate(prompts):
            made = model.generate(
                input_ids=prompt[None], attention_mask=torch.ones(1, len(prompt)), **options
            )
            written[name, row] = made[0, len(prompt) :]
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], written[name, row])
        assert any(not torch.equal(mixed[row], written[n, row]) for n in {*names} - {name})


def test_beams_and_several_answers_of_a_row(tmp_path):
    model = base("llama", 4)
    bank = load_adapters(model, folders(model, configs("llama"), tmp_path))
    names, ids = ["all", None, "some"], tiny_models.tokens(3)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"num_beams": 3, "num_return_sequences": 2, "attention_mask": torch.ones_like(ids)}
    with bank.rows(names, repeat=3):
        mixed = model.generate(input_ids=ids, **options)
    for row, name in enumerate(names):
        bank.use(name)
        assert torch.equal(
            mixed[2 * row : 2 * row + 2],
            model.generate(input_ids=ids, **options)[2 * row : 2 * row + 2],
        )
    refused = pytest.raises(AdapterError, match=r"has 9 rows.*given 3 names.*repeat=num_beams")
    with bank.rows(names), refused:
        model.generate(input_ids=ids, **options)


def test_a_mapping_that_does_not_fit_is_refused(tmp_path):
    model = base("llama")
    bank = load_adapters(model, folders(model, configs("llama"), tmp_path))
    with bank.rows(["all", None]):
        with pytest.raises(AdapterError, match=r"the batch has 3 rows, and rows\(\) was given 2"):
            answer(model, tiny_models.tokens(3))
        with pytest.raises(AdapterError, match=r"\(4, 2, 64\), which does not show the 2 rows"):
            model.model.layers[0].self_attn.q_proj(torch.ones(4, 2, 64))
        for act in (
            lambda: bank.use("all"),
            lambda: bank.remove("all"),
            lambda: bank.add("more", tmp_path / "all"),
            lambda: bank.rows(["all"]).__enter__(),
        ):
            with pytest.raises(AdapterError, match=r"inside rows\(\)"):
                act()
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        bank.rows(["other"]).__enter__()
    with pytest.raises(AdapterError, match="a name, or None, for each row"):
        bank.rows([]).__enter__()
    answer(model, tiny_models.tokens(3))  # the model is not watched any more


def test_experts_cannot_differ_by_row(tmp_path):
    layer = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)]), "q": nn.Linear(8, 8)})
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    paths = {
        "experts": make(model, LoRA(rank=2), tmp_path / "experts", 0),
        "q": make(model, LoRA(rank=2, targets=("q",)), tmp_path / "q", 0),
    }
    bank = load_adapters(model, paths)
    with bank.rows(["q", None]):
        assert bank.names == ("experts", "q")
    with pytest.raises(AdapterError, match=r"layers\.0\.experts\.0 is an expert"):
        bank.rows(["experts", None]).__enter__()


def test_an_adapter_that_overflows_spoils_its_own_rows_alone(tmp_path):
    model = base("llama")
    paths = folders(model, {name: LoRA(rank=4) for name in ("good", "bad")}, tmp_path)
    bank = load_adapters(model, paths)
    ids, names = tiny_models.tokens(3), ["good", "bad", None]
    piece = model.model.layers[0].self_attn.v_proj
    assert isinstance(piece, SharedLinear)
    for form in FORMS:
        with bank.rows(names, form=form):
            before = answer(model, ids)
        kept = piece.pair("bad").a[0, 0].item()
        piece.pair("bad").a[0, 0] = float("inf")
        with bank.rows(names, form=form):
            after = answer(model, ids)
        piece.pair("bad").a[0, 0] = kept
        assert not torch.isfinite(after[1]).all()
        assert torch.equal(after[::2], before[::2])


@pytest.mark.parametrize("form", ["masked", "grouped"])
def test_one_product_against_float64(form):
    """Any ranks, rows flattened or not, with and without a gradient."""
    torch.manual_seed(0)
    k, n, names = 24, 40, ("b", None, "a", "c", "a")
    pairs = {
        name: LowRank(torch.randn(r, k), torch.randn(n, r), s)
        for name, r, s in (("a", 3, 0.5), ("b", 8, 2.0), ("c", 1, -1.3))
    }
    x, y = torch.randn(5, 6, k), torch.randn(5, 6, n)
    wanted, size = y.double().clone(), y.double().abs()
    for row, name in enumerate(names):
        if name:
            pair = pairs[name]
            low = x[row].double() @ pair.a.double().T
            wanted[row] += pair.scale * low @ pair.b.double().T
            low = x[row].abs().double() @ pair.a.abs().double().T
            size[row] += abs(pair.scale) * low @ pair.b.abs().double().T
    bound = (k + 12 + 3) * 2.0**-24 * size  # terms of both sums, and roundings of s·B and y
    rows = BatchRows(names, form=form)
    rows.tokens = 6
    mixed = Mixed(rows, pairs, "proj", torch.float32)
    for flat in (False, True):
        for grad in (False, True):
            given = x.reshape(30, k) if flat else x
            with torch.set_grad_enabled(grad):
                base_of = (y.reshape(30, n) if flat else y).clone()
                found = mixed.add(base_of, given).reshape(5, 6, n)
            assert ((found - wanted).abs() <= bound).all()
    swapped = Mixed(BatchRows(names[::-1], form=form), pairs, "proj", torch.float32)
    assert not ((swapped.add(y.clone(), x) - wanted).abs() <= bound).all()


def test_the_form_follows_the_sizes():
    pairs = {
        name: LowRank(torch.ones(16, 8, device="meta"), torch.ones(8, 16, device="meta"), 1.0)
        for name in "abcdefghij"
    }

    def forms(count: int, device: str) -> list[bool]:
        some = {name: pairs[name] for name in list(pairs)[:count]}
        mixed = Mixed(BatchRows(tuple(some)), some, "proj", torch.float32)
        return [mixed.takes_grouped(tokens, torch.device(device)) for tokens in (1, 8, 512)]

    assert forms(2, "cpu") == [False, False, True]
    assert forms(4, "cpu") == [False, True, True]
    assert forms(8, "cuda") == [False, False, False]  # 128 columns
    assert forms(10, "cuda") == [False, False, True]
    assert batch_rows.FREE_COLUMNS == 128


def test_heads_of_different_adapters(tmp_path):
    """Rows go through the head of their own adapter, or the base's."""
    model = base("bert")
    paths = folders(model, configs("bert"), tmp_path)
    bank = load_adapters(model, paths)
    ids, names = tiny_models.tokens(4), ["some", "all", None, "some"]
    with bank.rows(names):
        mixed = answer(model, ids)
    assert mixed.shape == (4, 3)
    with torch.no_grad(), bank.rows(names):
        pooled = model.bert(ids).pooler_output
        heads = [model.classifier.held_by(n) or model.classifier.base for n in ("some", "all")]
        wanted = torch.stack([heads[0](pooled[0]), heads[1](pooled[1])])
    assert (mixed[:2] - wanted).abs().max() < tolerance(wanted)
    assert (mixed[:2].flip(0) - wanted).abs().max() > 100 * tolerance(wanted)


def test_a_scaled_embedding(tmp_path):
    """Gemma multiplies its embeddings by √H, and so the low-rank part."""
    model = tiny_models.build("gemma3")
    paths = folders(model, {"one": LoRA(rank=3, targets=("embed_tokens",))}, tmp_path)
    ids, plain = tiny_models.tokens(), answer(model)
    bank = load_adapters(model, paths)
    bank.use("one")
    one = answer(model)
    fresh = tiny_models.build("gemma3")
    load_adapter(fresh, paths["one"])
    assert torch.equal(one, answer(fresh))
    with bank.rows([None, "one"]):
        mixed = answer(model, ids)
    assert torch.equal(mixed[0], plain[0])
    assert (mixed[1] - one[1]).abs().max() < tolerance(one)
    assert (one - plain).abs().max() > 100 * tolerance(one)


@pytest.mark.parametrize("form", ["masked", "grouped"])
def test_peft_agrees_on_a_mixed_batch(form, tmp_path):
    """With an adapter of ours and one that PEFT saved."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = base("llama")
    paths = folders(model, {"a": LoRA(rank=4, alpha=6)}, tmp_path)
    made = LoraConfig(r=8, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
    made = get_peft_model(base("llama"), made)
    torch.manual_seed(3)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    made.save_pretrained(tmp_path / "b")
    paths["b"] = tmp_path / "b"
    bank = load_adapters(model, paths)
    ids, names = tiny_models.tokens(5), ["b", None, "a", "b", "a"]
    with bank.rows(names, form=form):
        ours = answer(model, ids)
    theirs = PeftModel.from_pretrained(base("llama"), paths["a"], adapter_name="a")
    theirs.load_adapter(paths["b"], "b")
    wanted = answer(theirs.eval(), ids, adapter_names=[name or "__base__" for name in names])
    assert (ours - wanted).abs().max() < tolerance(wanted)
    wrong = answer(theirs, ids, adapter_names=[name or "a" for name in names])
    assert (ours - wrong).abs().max() > 100 * tolerance(wanted)
