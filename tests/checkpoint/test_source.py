"""Opening model folders: what is found, and what is refused with advice."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.errors import FormatError, SourceError
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.format import STATE_SUFFIX, to_bnb_tensors
from qlora_kit.quant.weight import NF4Weight
from tests import tiny_models


def make_folder(folder, tensors=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


def test_sharded_folder_reads_every_tensor(tmp_path):
    folder = tiny_models.saved("llama")
    source = open_source(folder)
    state = tiny_models.build("llama").state_dict()
    assert len({info.file for info in source.tensors.values()}) > 1
    assert set(source.tensors) == set(state)
    assert all(torch.equal(source.read(name), state[name]) for name in state)
    assert source.config["model_type"] == "llama"
    assert not source.is_nf4
    assert list(source.weight_names()) == list(source.tensors)
    with pytest.raises(FormatError, match="no tensor 'other'"):
        source.read("other")


def test_nf4_weights_are_gathered(tmp_path):
    weight = NF4Weight.quantize(torch.randn(8, 64))
    tensors = {f"q.weight{s}": t for s, t in to_bnb_tensors(weight).items()}
    tensors["norm.absmax"] = torch.ones(3)  # looks like a companion, but of nothing
    quant = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    source = open_source(make_folder(tmp_path, tensors, {"quantization_config": quant}))
    assert source.is_nf4
    assert source.quantized_names() == {"q.weight"}
    assert sorted(source.weight_names()) == ["norm.absmax", "q.weight"]
    got = source.read_weight("q.weight")
    assert isinstance(got, NF4Weight)
    assert torch.equal(got.dequantize(), weight.dequantize())
    assert source.weight_shape("q.weight") == (8, 64)
    assert source.weight_dtype("q.weight") == torch.float32
    assert source.quant_of("q.weight") == QuantConfig()
    assert source.weight_shape("norm.absmax") == (3,)
    assert source.weight_dtype("norm.absmax") == torch.float32
    assert torch.equal(source.read_weight("norm.absmax"), torch.ones(3))


@pytest.mark.parametrize(
    "state", [b"[]", b"{", b'{"shape": 3, "dtype": "float32", "blocksize": 64}', b'{"shape": []}']
)
def test_a_damaged_state_is_refused(tmp_path, state):
    mark = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    source = open_source(make_folder(tmp_path, {f"q.weight{STATE_SUFFIX}": mark}))
    with pytest.raises(FormatError, match=r"q\.weight.*is damaged"):
        source.weight_shape("q.weight")


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "bitsandbytes fp4",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"bits": 4}, "unknown"),
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path, quant, name):
    folder = make_folder(tmp_path, config={"quantization_config": quant})
    with pytest.raises(FormatError, match=f"quantized with {name}.*original 16-bit model"):
        open_source(folder)


def test_our_own_quantization_is_known(tmp_path):
    folder = make_folder(
        tmp_path, config={"quantization_config": {"quant_method": "qlora_kit_nf4"}}
    )
    assert open_source(folder).is_nf4


def test_side_files_are_found_and_copied(tmp_path):
    folder = make_folder(tmp_path / "a")
    wanted = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "spiece.model",
        "LICENSE",
    }
    for name in wanted | {
        "README.md",
        "training_args.bin",
        "trainer_state.json",
        "tokenizer.safetensors",
    }:
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (tmp_path / "b").mkdir()
    open_source(folder).copy_side_files(tmp_path / "b")
    assert {p.name for p in (tmp_path / "b").iterdir()} == wanted | {"additional_chat_templates"}
    assert (tmp_path / "b" / "additional_chat_templates" / "rag.jinja").read_text() == "rag"


def test_pickles_are_refused_with_advice(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"pickle can run any code.*save_pretrained"):
        open_source(tmp_path)


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"w": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="is an adapter, not a model"):
        open_source(tmp_path)


def test_folders_that_are_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"holds no model.*It has: notes\.txt"):
        open_source(tmp_path)
    folder = make_folder(tmp_path / "a")
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json is missing"):
        open_source(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        open_source(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="JSON object, got list"):
        open_source(folder)
    with pytest.raises(SourceError, match=r"is a file\. Name the folder"):
        open_source(folder / "model.safetensors")
    save_file({"v": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(SourceError, match="2 safetensors files but no"):
        open_source(folder)


@pytest.mark.parametrize("name", ["custom.safetensors", "model.safetensors"])
def test_a_single_file_of_any_name_is_enough(tmp_path, name):
    folder = make_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    assert list(open_source(folder).tensors) == ["w"]


def test_a_bad_index_is_refused(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_models.saved("llama"), folder)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    files = sorted(set(index["weight_map"].values()))

    def rewrite(weight_map):
        index_path.write_text(json.dumps({"weight_map": weight_map}))

    rewrite({**index["weight_map"], "ghost.weight": files[0]})
    with pytest.raises(FormatError, match=r"'ghost\.weight'.*incomplete"):
        open_source(folder)
    rewrite({**index["weight_map"], "w": "../elsewhere.safetensors"})
    with pytest.raises(FormatError, match="no file of that folder"):
        open_source(folder)
    rewrite({})
    with pytest.raises(FormatError, match="no weight_map"):
        open_source(folder)
    rewrite(index["weight_map"])
    (folder / files[-1]).unlink()
    with pytest.raises(SourceError, match=f"{files[-1]} is missing"):
        open_source(folder)


def test_several_gguf_files_ask_for_a_choice(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"several GGUF files; name one: a\.gguf, b\.gguf"):
        open_source(tmp_path)
