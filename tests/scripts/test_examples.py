"""The examples are valid runs, and prepare_demo.py makes every file they name."""

import dataclasses
from pathlib import Path

import pytest

from qlora_kit.cli.run_config import load_config, parse_words
from qlora_kit.train.data.dataset import eval_names
from tests.scripts.loading import SCRIPTS, load_script

EXAMPLES = sorted((SCRIPTS.parent / "examples").glob("*.yaml"))
demo = load_script("prepare_demo")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_a_valid_run_of_demo_files(path):
    config = load_config(parse_words([str(path)], "train"), "train")
    pieces = {demo.PIECES[name].path for name in demo.CHOICES[path.stem]}
    data = config.data
    for source in (config.model.path, data.train, data.eval, *data.eval_sets.values()):
        if source is not None:
            assert Path(source).parts[0] == "demo"
            assert Path(source).parts[1] in pieces
    assert eval_names(data)
    assert config.output == f"runs/{path.stem}"
    assert config.eval.task != "auto"


def test_there_is_an_example_for_every_choice_but_all():
    assert {path.stem for path in EXAMPLES} == set(demo.CHOICES) - {"all"}


def test_quickstart_stays_small():
    config = load_config(parse_words([str(EXAMPLES[-1])], "train"), "train")
    assert (config.data.limit_train, config.data.limit_eval) == (960, 500)
    assert dataclasses.asdict(config.adapter)["rank"] == 16
    assert config.export.merge
