"""Adapter folders: PEFT's names and fields, whole or not at all, and clear refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_kit.adapters.formats.peft import (
    AdapterFiles,
    LowRank,
    own_name,
    peft_key,
    read_adapter,
    write_adapter,
)
from qlora_kit.adapters.formats.peft_config import BaseInfo, own_pattern, peft_pattern
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.core.errors import AdapterError, FormatError, SourceError, UserError
from qlora_kit.core.patterns import matches
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models
from tests.adapters.bases import quantize

NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in ("attn.q_proj", "mlp.up_proj")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid adapter folder of two modules, one of another rank and alpha."""
    config = LoRA(rank=2, alpha=4, rank_pattern={"b": 3}, alpha_pattern={"b": 6})
    deltas = {
        "layers.a": LowRank(torch.randn(2, 8), torch.randn(4, 2), 2.0),
        "layers.b": LowRank(torch.randn(3, 8), torch.randn(4, 3), 2.0),
    }
    base = BaseInfo(path="models/base", revision="main", quant=QuantConfig(), dtype="bfloat16")
    write_adapter(tmp_path / "adapter", AdapterFiles(config=config, deltas=deltas, base=base))
    return tmp_path / "adapter"


def change(folder: Path, file: str = "adapter_config.json", **fields: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_a_folder_goes_round(folder: Path):
    first = read_adapter(folder)
    assert first.config.rank_of("layers.b") == 3
    assert {name: pair.scale for name, pair in first.deltas.items()} == {
        "layers.a": 2.0,
        "layers.b": 2.0,
    }
    assert first.base == BaseInfo(
        path="models/base", revision="main", quant=QuantConfig(), dtype="bfloat16", recorded=True
    )
    again = folder.with_name("again")
    write_adapter(again, first)
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("family", "labels", "config", "peft"),
    [
        ("llama", None, LoRA(rank=4), {"target_modules": "all-linear"}),
        ("gpt2", None, LoRA(rank=4), {"target_modules": "all-linear", "fan_in_fan_out": True}),
        (
            "roberta",
            3,
            LoRA(rank=4, alpha=8, rslora=True, targets=("query", "value")),
            {"target_modules": ["query", "value"], "use_rslora": True, "lora_alpha": 8},
        ),
        (
            "llama",
            3,
            LoRA(rank=4, dropout=0.1, targets="q_proj", init="gaussian"),
            {
                "target_modules": ["q_proj"],
                "lora_dropout": 0.1,
                "init_lora_weights": "gaussian",
            },
        ),
    ],
    ids=["llama", "gpt2", "roberta_classifier", "llama_classifier"],
)
def test_names_and_fields_are_those_peft_writes(tmp_path, family, labels, config, peft):
    task = "CAUSAL_LM" if labels is None else "SEQ_CLS"
    theirs = LoraConfig(**{"r": 4, "lora_alpha": 32, "task_type": task} | peft)
    get_peft_model(tiny_models.build(family, num_labels=labels), theirs).save_pretrained(
        tmp_path / "theirs"
    )
    attach(tiny_models.build(family, num_labels=labels), config).save(tmp_path / "ours")
    weights = "adapter_model.safetensors"
    wanted, own = load_file(tmp_path / "theirs" / weights), load_file(tmp_path / "ours" / weights)
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in wanted.items()}
    with safe_open(tmp_path / "ours" / weights, "pt") as file:
        assert file.metadata() == {"format": "pt"}

    ours = LoraConfig.from_pretrained(tmp_path / "ours").to_dict()
    stored = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert stored.keys() <= ours.keys()  # nothing that PEFT does not know
    theirs = LoraConfig.from_pretrained(tmp_path / "theirs").to_dict()
    free = {"target_modules", "modules_to_save"}  # compared by their effect, in the other file
    assert {k for k in ours.keys() - free if ours[k] != theirs[k]} <= {"base_model_name_or_path"}
    assert set(ours["modules_to_save"] or []) <= set(theirs["modules_to_save"] or [])


@pytest.mark.parametrize(
    "pattern", ["q_proj", "attn.q_proj", "model.layers.1.mlp.up_proj", r"re:.*\.1\..*", "re:.*up.*"]
)
def test_our_patterns_mean_the_same_in_peft(pattern):
    translated = peft_pattern(pattern)
    for name in NAMES:
        theirs = re.match(rf"(.*\.)?({translated})$", name) is not None  # get_pattern_key
        assert theirs == matches(name, pattern), (name, translated)
    assert own_pattern(translated) == pattern


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r"layers\.1\..*", "q_proj|up_proj", "^model.layers.0.attn.q_proj", r".*\.0\.mlp.*"],
)
def test_peft_patterns_mean_the_same_here(pattern):
    translated = own_pattern(pattern)
    for name in NAMES:
        theirs = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert theirs == matches(name, translated), (name, translated)
    assert own_pattern(peft_pattern(translated)) == translated


def test_names_translate_both_ways():
    for name in ("model.layers.0.q_proj.lora_A", "h.0.c_attn.lora_B", "classifier.dense.weight"):
        assert own_name(peft_key(name)) == name
    assert own_name("model.layers.0.q_proj.lora_A.weight") is None


def test_lora_fa_reads_as_plain_lora_without_our_file(tmp_path):
    adapter = attach(quantize(tiny_models.build("llama")), LoRAFA(rank=4))
    adapter.save(tmp_path / "out", base_model="models/base")
    ours = read_adapter(tmp_path / "out")
    assert isinstance(ours.config, LoRAFA)
    assert ours.base.quant == QuantConfig()
    assert ours.base.dtype == "float32"
    (tmp_path / "out" / "qlora_kit.json").unlink()
    plain = read_adapter(tmp_path / "out")
    assert type(plain.config) is LoRA
    assert plain.base == BaseInfo(path="models/base", recorded=False)


def test_the_base_of_an_unquantized_model_is_recorded_as_such(tmp_path):
    model = tiny_models.build("llama", dtype=torch.bfloat16)
    attach(model, LoRA(rank=2, dtype="float16")).save(tmp_path, revision="v2")
    files = read_adapter(tmp_path)
    assert files.base == BaseInfo(revision="v2", dtype="bfloat16", recorded=True)
    assert files.config.dtype == "float16"


@pytest.mark.parametrize("config", [LoRA(rank=4), LoRAFA(rank=4, dtype="bfloat16")])
@pytest.mark.parametrize("labels", [None, 3])
def test_saving_and_loading_keeps_every_bit(tmp_path, config, labels):
    source = attach(quantize(tiny_models.build("llama")), config, seed=3)
    if labels:
        source = attach(tiny_models.build("llama", num_labels=labels), config, seed=3)
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.normal_()
    source.save(tmp_path / "out")
    source.save(tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    model = source.model
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    trained = [name for name, _ in source.named_parameters()]
    source.detach_from_model()
    target = load_adapter(model, tmp_path / "out")
    assert target.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in target.state_dict().items())
    assert [name for name, _ in target.named_parameters()] == trained
    assert {p.dtype for p in target.parameters()} == {getattr(torch, config.dtype)}
    assert type(target.config) is type(config)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapter = attach(tiny_models.build("llama"), LoRA(rank=2))
    adapter.save(tmp_path / "out", base_model="models/llama")
    with pytest.raises(AdapterError, match=r"and 13 more modules.*models/llama"):
        load_adapter(tiny_models.build("gpt2"), tmp_path / "out")
    with pytest.raises(AdapterError, match="of another size"):
        load_adapter(tiny_models.build("llama", intermediate_size=192), tmp_path / "out")


@pytest.mark.parametrize(("made_on", "bits"), [(4, "4-bit"), (16, "16- or 32-bit")])
def test_a_base_stored_otherwise_is_mentioned(tmp_path, caplog, monkeypatch, made_on, bits):
    monkeypatch.setattr("qlora_kit.core.log._said", set())
    four, plain = quantize(tiny_models.build("llama")), tiny_models.build("llama")
    source, target = (four, plain) if made_on == 4 else (plain, four)
    attach(source, LoRA(rank=2)).save(tmp_path / "out")
    with caplog.at_level("INFO", logger="qlora_kit"):
        load_adapter(target, tmp_path / "out")
    assert f"was trained on a {bits} base" in caplog.text


REFUSED_FIELDS = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "lora_A and lora_B where lora_A and lora_B and lora_magnitude belong"),
    ({"bias": "all"}, "trained biases"),
    ({"init_lora_weights": "pissa_niter_16"}, "changes the base"),
    ({"lora_bias": True}, "a bias on lora_B"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "bare parameters"),
    ({"r": 0}, "rank must be at least 1"),
    ({"r": "many"}, "invalid literal"),
    ({"r": 5}, r"its rank is 5"),
    ({"rank_pattern": {}}, "its rank is 2"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_FIELDS)
def test_what_would_compute_something_else_is_refused(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(FormatError, match=message):
        read_adapter(folder)


def test_fields_of_other_versions_are_tolerated(folder):
    change(folder, brand_new_field={"a": 1}, use_dora=False, loftq_config={}, corda_config=None)
    assert len(read_adapter(folder).deltas) == 2


A_KEY = "base_model.model.layers.a.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(A_KEY), "layers.a has lora_B where lora_A and lora_B belong"),
        (lambda t: t.update({A_KEY: torch.ones(2)}), r"expected \(r, in\)"),
        (lambda t: t.update({A_KEY: torch.ones(2, 8, dtype=torch.float64)}), "tensors are float64"),
        (lambda t: t.update({"x.weight": torch.ones(1)}), "unexpected tensor 'x.weight'"),
        (
            lambda t: t.update({"base_model.model.layers.a.lora_magnitude_vector": torch.ones(1)}),
            "and lora_magnitude where lora_A and lora_B belong",
        ),
        (
            lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(1)}),
            "embed has lora_embedding_A where",
        ),
        (lambda t: t.clear(), "no lora_A and lora_B pair"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(folder, edit, message):
    change_tensors(folder, edit)
    with pytest.raises(FormatError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 2}, "reads up to 1"),
        ({"format_version": "1"}, "format_version"),
        ({"method": "nora"}, "unknown method 'nora'"),
        ({"quant": {"block_size": 7, "double_quant": True}}, "block_size"),
        ({"quant": [1]}, "qlora_kit.json"),
        ({"base": "models/base"}, "qlora_kit.json"),
    ],
)
def test_a_side_file_we_cannot_read_is_refused(folder, fields, message):
    change(folder, "qlora_kit.json", **fields)
    with pytest.raises(FormatError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("file", ["adapter_config.json", "qlora_kit.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_broken_json_is_refused(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(FormatError, match=file):
        read_adapter(folder)


def test_truncated_weights_are_refused_at_every_length(folder):
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in [0, 4, 8, 100, *range(9, len(whole), 61)]:
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="not a readable safetensors file"):
            read_adapter(folder)


def test_pickles_and_missing_files_are_refused(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(SourceError, match="pickle"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(SourceError, match=r"adapter_model.safetensors is missing"):
        read_adapter(folder)
    with pytest.raises(SourceError, match="not an adapter folder"):
        read_adapter(folder / "nowhere")


def test_every_refusal_is_an_error_a_user_can_act_on():
    for error in (AdapterError, FormatError, SourceError):
        assert issubclass(error, UserError)


def test_an_adapter_is_not_overwritten_by_accident(folder):
    files = read_adapter(folder)
    with pytest.raises(SourceError, match="already holds an adapter"):
        write_adapter(folder, files)
    (folder / "trainer_state.json").write_text("{}")  # a checkpoint: other files stay
    write_adapter(folder, files, overwrite=True)
    assert (folder / "trainer_state.json").exists()
    assert len(read_adapter(folder).deltas) == 2


@pytest.mark.parametrize("existing", [False, True], ids=["new_folder", "inside_a_checkpoint"])
def test_a_write_that_fails_leaves_no_adapter(folder, tmp_path, monkeypatch, existing):
    target = tmp_path / "target"
    if existing:
        target.mkdir()
        (target / "trainer_state.json").write_text("{}")

    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_kit.adapters.formats.peft.side_file_json", fail)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(target, read_adapter(folder))
    assert target.exists() == existing
    assert not list(tmp_path.glob("**/*partial*"))
    with pytest.raises(SourceError, match="not an adapter folder"):
        read_adapter(target)


def test_deltas_hold_the_scale():
    pair = LowRank(torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(4, 2).bfloat16(), 1.5)
    wanted = 1.5 * pair.b.double() @ pair.a.double()
    assert pair.delta().dtype == torch.float32
    torch.testing.assert_close(pair.delta().double(), wanted, rtol=1e-6, atol=1e-6)
