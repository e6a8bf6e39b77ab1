"""The run schema through YAML and flags: conversion, names, messages, and the way back."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from qlora_kit.cli.run_config import build_config, flag_value, load_config, parse_words, to_yaml
from qlora_kit.cli.schema import leaves, sections, type_text
from qlora_kit.cli.yaml_file import parse_yaml, read_yaml
from qlora_kit.core.errors import ConfigError
from qlora_kit.train.config import RunConfig

BASE = {"model": {"path": "base"}, "data": {"train": "rows.jsonl"}}
ROOT = Path(__file__).resolve().parents[2]


def load(text: str, *flags: str, folder: Path) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(parse_words([str(file), *flags], "train"), "train")


def test_defaults_are_those_of_the_dataclasses():
    config = build_config(BASE)
    sections_ = {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}
    assert config == RunConfig(model=sections_["model"], data=sections_["data"])
    assert config.quant.skip == ("lm_head",)


def test_every_field_has_a_docstring():
    assert not [key for key, field in leaves().items() if not field.doc]
    assert not [section.name for section in sections() if not section.doc]


def test_round_trip_with_every_kind_of_value():
    """What --print-config writes reads back equal."""
    overrides = {
        "model.revision": "123",
        "data.columns": "{question: prompt}",
        "adapter.targets": "[q_proj,v_proj]",
        "adapter.rank_pattern": "{'re:.*mlp.*': 4}",
        "eval.choices": "yes,no",
        "train.learning_rate": "3e-5",
        "train.eval_every": "7",
        "train.loggers": "[]",
    }
    config = build_config(BASE, overrides)
    assert config.model.revision == "123"
    assert config.data.columns == {"question": "prompt"}
    assert config.adapter.targets == ("q_proj", "v_proj")
    assert config.adapter.rank_pattern == {"re:.*mlp.*": 4}
    assert config.eval.choices == ("yes", "no")
    assert config.train.loggers == ()
    assert build_config(parse_yaml(to_yaml(config))) == config
    assert build_config(yaml.safe_load(to_yaml(config))) == config  # any YAML reader will do


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_examples_are_valid(path):
    config = load_config(parse_words([str(path)], "train"), "train")
    assert config.output.startswith("runs/")


def test_flags_win_over_the_file(tmp_path):
    text = "model: {path: a}\ndata: {train: b}\ntrain: {epochs: 3, seed: 4}\nadapter:\n"
    config = load(
        text, "--train.epochs=2", "--method", "lora_fa", "--model.bits", "16", folder=tmp_path
    )
    assert (config.train.epochs, config.train.seed) == (2.0, 4)
    assert (config.method, config.model.bits) == ("lora_fa", 16)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--resume"], {"resume": "true"}),
        (["--resume", "false"], {"resume": "false"}),
        (["--resume", "--train.seed", "3"], {"resume": "true", "train.seed": "3"}),
        (["--train.max-steps", "-1"], {"train.max_steps": "-1"}),
        (["--data.system_prompt=--x = y"], {"data.system_prompt": "--x = y"}),
    ],
)
def test_words(words, expected):
    assert parse_words(words, "train").overrides == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--train.epoch", "2"],
            r"--train\.epoch is not a known flag\. Did you mean --train\.epoch",
        ),
        (["--bits", "16"], r"Did you mean --model\.bits\?"),
        (["--train.rank", "4"], r"Did you mean --adapter\.rank"),
        (["--metod", "lora"], r"Did you mean --method\?"),
        (["--dryrun"], r"Did you mean --dry-run\?"),
        (["--frobnicate"], r"not a known flag\. `qlora-kit train --help`"),
        (["--train.epochs"], r"needs a value"),
        (["--train.epochs", "--resume"], r"needs a value"),
        (["a.yaml", "b.yaml"], r"cannot place 'b\.yaml'"),
        (["-x"], r"cannot place '-x'"),
        (["a.yaml", "--config", "b.yaml"], r"cannot place '--config'"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_words(words, "train", switches=("dry-run", "print-config"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epoch: 2}", r"'train\.epoch' is not a known key\. Did you mean train\.epochs\?"),
        ("train: {rank: 2}", r"Did you mean adapter\.rank"),
        (
            "train: {lr: 2}",
            r"'train\.lr' is not a known key\. Known in 'train': epochs, .*learning",
        ),
        ("trian: {epochs: 2}", r"'trian' is not a known key\. Did you mean train\?"),
        ("learning_rate: 2e-4", r"Did you mean train\.learning_rate\?"),
        ("zzz: 1", r"'zzz' is not a known key\. Known: model, data,"),
        ("train: 3", r"'train' is a section and takes keys"),
        ("train: {seed: x}", r"train\.seed takes whole number, got 'x'\. Seed of data order"),
        ("train: {seed: 1.5}", r"train\.seed takes whole number, got 1\.5"),
        ("method: qlora", r"method takes lora, rslora, .* got 'qlora'"),
        ("eval: {choices: a}", r"eval\.choices takes list of text, got 'a'"),
        ("adapter: {rank: 0}", r"rank must be at least 1"),
        ("quant: {block_size: 65}", r"block_size must be one of"),
        ("model: {path: 1}", r"model\.path takes text, got 1"),
        ("train: {epochs: 1, epochs: 2}", r"the key 'epochs' comes twice \(line 3\)"),
        ("train: {epochs: 1", r"not YAML: .* \(line \d\)"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    given = "" if text.startswith("model") else "model: {path: a}\n"
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"{given}data: {{train: b}}\n{text}\n", folder=tmp_path)
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_values_are_named_with_their_meaning(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train has to be given: A \.jsonl"):
        load("model: {path: base}", folder=tmp_path)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        read_yaml(tmp_path / "binary.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match=r"holds sections .* got list"):
        load("- a\n", folder=tmp_path)


def test_no_run_file():
    with pytest.raises(ConfigError, match="needs a run file"):
        load_config(parse_words([], "train"), "train")


def test_flags_alone_are_enough():
    words = ["--model.path", "base", "--data.train", "rows.jsonl"]
    assert load_config(parse_words(words, "train"), "train") == build_config(BASE)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("2e-4", 0.0002),
        ("1.", 1.0),
        ("-3", -3),
        ("1e", "1e"),
        ("null", None),
        ("[a, no]", ["a", "no"]),
    ],
)
def test_yaml_values(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_flag_values_follow_the_type():
    assert flag_value(leaves()["data.eval"], "null") is None
    assert flag_value(leaves()["model.path"], "null") == "null"
    assert flag_value(leaves()["adapter.targets"], "re:a,b") == "re:a,b"
    assert flag_value(leaves()["adapter.targets"], "a,b") == ["a", "b"]
    assert flag_value(leaves()["data.columns"], "{a: [") == "{a: ["


def test_type_text():
    assert type_text(bool) == "true or false"
    assert type_text(str | tuple[str, ...]) == "text or list of text"
