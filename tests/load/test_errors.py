"""What a user sees when a model cannot be loaded: one error, that says what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.core.errors import ConfigError, FormatError, SourceError, UserError
from qlora_kit.load.model import load
from tests import tiny_models

pytestmark = pytest.mark.transformers_compat


@pytest.fixture
def folder(tmp_path):
    return tiny_models.save("llama", tmp_path / "model", max_shard_size="10GB")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_unknown_architecture(folder):
    edit_config(folder, model_type="llama17")
    with pytest.raises(FormatError, match=r"llama17.*newer transformers"):
        load(folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama17.Llama17"})
    with pytest.raises(FormatError, match="its own code, which is never run"):
        load(folder)


def test_code_in_the_folder_is_not_run(folder):
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    model, _ = load(folder)
    assert type(model).__module__.startswith("transformers.")


@pytest.mark.parametrize("quant", ["nf4", "16-bit"])
def test_missing_weights_are_listed(folder, quant):
    gone = [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
    ]
    edit_weights(folder, lambda t: [t.pop(name) for name in gone])
    options = {} if quant == "nf4" else {"quant": None}
    with pytest.raises(FormatError, match="lack") as caught:
        load(folder, **options)
    if quant == "16-bit":
        assert all(name in str(caught.value) for name in gone)
    else:
        assert gone[0] in str(caught.value)
    edit_weights(folder, lambda t: t.update({gone[0]: torch.ones(128, 64)}))
    with pytest.raises(FormatError, match="input_layernorm"):
        load(folder, **options)


def test_a_missing_expert(tmp_path):
    folder = tiny_models.save("qwen3_moe", tmp_path, max_shard_size="10GB")
    edit_weights(folder, lambda t: t.pop("model.layers.0.mlp.experts.2.up_proj.weight"))
    with pytest.raises(UserError, match=r"experts\.gate_up_proj.*shape"):
        load(folder)


@pytest.mark.parametrize("quant", ["nf4", "16-bit"])
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_shapes_that_do_not_fit(folder, name, quant):
    edit_weights(folder, lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(UserError, match=f"{name}.*shape"):
        load(folder, **({} if quant == "nf4" else {"quant": None}))


def test_a_nan_is_refused_by_name(folder):
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_weights(folder, lambda t: t[name].view(-1)[7].fill_(float("inf")))
    with pytest.raises(UserError, match=rf"{name} \(1 of \d+ blocks\): NaN or infinite"):
        load(folder)


def test_a_nan_in_an_expert_is_refused_by_name(tmp_path):
    folder = tiny_models.save("mixtral", tmp_path, max_shard_size="10GB")
    name = next(
        k for k in load_file(folder / "model.safetensors") if k.endswith("experts.3.w2.weight")
    )
    edit_weights(folder, lambda t: t[name].view(-1)[7].fill_(float("nan")))
    with pytest.raises(UserError, match=r"experts\.down_proj \(expert 3\): NaN"):
        load(folder)


def test_wrong_places(folder, tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        load("./no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no model"):
        load(tmp_path / "empty")
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json"):
        load(folder)


def test_arguments_out_of_range(folder):
    with pytest.raises(ConfigError, match="task must be one of"):
        load(folder, task="poetry")
    with pytest.raises(ConfigError, match="dtype must be"):
        load(folder, dtype="int8")
    with pytest.raises(ConfigError, match="dtype must be"):
        load(folder, dtype=torch.float64)
    with pytest.raises(ConfigError, match="is not one"):
        load(folder, device="toaster")
    with pytest.raises(ConfigError, match="CUDA devices"):
        load(folder, device="cuda:99")


def test_a_task_the_architecture_does_not_have(tmp_path):
    from transformers import CLIPConfig

    folder = tiny_models.save("llama", tmp_path)
    config = CLIPConfig().to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no causal_lm model"):
        load(folder)


def test_a_configuration_that_makes_no_sense(folder):
    edit_config(folder, num_attention_heads="many")
    with pytest.raises(UserError, match=r"config\.json"):
        load(folder)


def test_disk_offload_is_refused(folder):
    from transformers import AutoModelForCausalLM

    from qlora_kit.load.hf_quantizer import NF4Config

    with pytest.raises(ConfigError, match="disk"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=NF4Config(), device_map={"": "disk"}
        )
