"""`qlora-kit plan`: what a run takes and what fits, without a GPU and without weights."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.cli.logs import quiet_progress, setup_logging
from qlora_kit.cli.run_config import CommandLine, build_config, load_config, parse_words
from qlora_kit.cli.run_help import run_help
from qlora_kit.core.errors import ConfigError
from qlora_kit.train.config import RunConfig

if TYPE_CHECKING:
    from qlora_kit.plan.gpus import Gpu
    from qlora_kit.plan.search import Planner

_USAGE = """\
qlora-kit plan RUN.yaml|MODEL [--budget 44GiB] [--gpu l40s]
                       [--section.field VALUE ...]"""
_ABOUT = """\
Predict a training run's memory by component, whether it fits, the largest batch
and the longest row that do, and the fastest settings that do. RUN.yaml is a run
file; MODEL a folder, a .gguf file or a hub id, planned with the defaults below.
Only the model's configuration is read. No GPU is needed. The exit code is 3 if
the run does not fit."""
_OWN = {
    "--gpu NAME": "card to plan for, such as h100, l40s, rtx-4090; default: this machine's, or "
    "l40s without one",
    "--batch N": "the same as --train.batch_size",
    "--seq N": "the same as --data.max_length",
    "--optimizers A,B": "optimizers that the fastest settings may use instead",
    "--host-memory SIZE": "pinned host memory that there is, such as 64GiB",
    "--compare-methods": "one table of full fine-tuning, LoRA, LoRA-FA, QLoRA and both",
    "--json": "print JSON instead of tables",
    "-h, --help": "show this text",
}
_SHORT = {"batch": "train.batch_size", "seq": "data.max_length"}
_OPTIONS = ("gpu", "batch", "seq", "optimizers", "host-memory")
_SWITCHES = ("json", "compare-methods")
NO_DATA = "none"
"""What stands for the data of a model that is planned without a run file."""
NO_FIT = 3
"""Exit code of a plan whose run does not fit."""


def run(argv: Sequence[str]) -> int:
    """Plan; see `qlora-kit plan --help`.

    Args:
        argv: the words after `qlora-kit plan`.

    Returns:
        0 if the run fits its budget, else `NO_FIT`; 0 for a comparison.
    """
    if "-h" in argv or "--help" in argv:
        print(run_help(_USAGE, _ABOUT, _OWN), end="")
        return 0
    line = parse_words(argv, "plan", switches=_SWITCHES, options=_OPTIONS)
    config = read_run(line)
    setup_logging()
    quiet_progress()

    from qlora_kit.plan.plan import compare_methods, describe, make_plan
    from qlora_kit.plan.table import methods_table
    from qlora_kit.train.planning import setup_of

    varied = config.data.train != NO_DATA and not config.data.packing
    batch, seq = config.train.batch_size, config.data.max_length
    setup = setup_of(config, batch=batch, seq=seq, varied=varied)
    planner = _planner(config, line.options)
    as_json = "json" in line.options
    if "compare-methods" in line.options:
        found = compare_methods(planner, setup)
        if as_json:
            print(json.dumps({name: describe(one) for name, one in found.items()}, indent=1))
        else:
            print(methods_table(found, config.model.path, planner.budget))
        return 0
    others = [name for name in line.options.get("optimizers", "").split(",") if name]
    made = make_plan(planner, setup, config.model.path, optimizers=others)
    print(json.dumps(made.to_dict(), indent=1) if as_json else made)
    return 0 if made.fits else NO_FIT


def read_run(line: CommandLine) -> RunConfig:
    """The run that a command line of `plan` names.

    Args:
        line: sorted words; its file may be a run file or a model.

    Returns:
        The run; a model's has the defaults of every field and no data.

    Raises:
        ConfigError: nothing is named, or a field is wrong.

    Example:
        >>> from pathlib import Path
        >>> line = CommandLine(config=Path("org/model"), overrides={}, options={"seq": "512"})
        >>> read_run(line).model.path, read_run(line).data.max_length
        ('org/model', 512)
    """
    given = line.overrides | {
        key: line.options[name] for name, key in _SHORT.items() if name in line.options
    }
    named = line.config
    if named is None and "model.path" not in given:
        raise ConfigError(
            "qlora-kit plan needs a run file or a model, as in `qlora-kit plan "
            "meta-llama/Llama-3.1-8B --budget 44GiB`. See `qlora-kit plan --help`."
        )
    if named is not None and named.suffix.lower() in (".yaml", ".yml"):
        whole = CommandLine(config=named, overrides=given, options=line.options)
        return load_config(whole, "plan")
    if named is not None:
        given = {"model.path": named.as_posix()} | given
    return build_config({"data": {"train": NO_DATA}}, given)


def _planner(config: RunConfig, options: dict[str, str]) -> "Planner":
    from qlora_kit.plan.budget import Budget
    from qlora_kit.plan.read import read_config
    from qlora_kit.plan.search import Planner

    gpu = _gpu(options)
    budget = Budget.of(config.budget, gpu, options.get("host-memory"))
    return Planner(read_config(config.model.path, revision=config.model.revision), gpu, budget)


def _gpu(options: dict[str, str]) -> "Gpu":
    from qlora_kit.plan.gpus import DEFAULT, find_gpu, this_machine

    if "gpu" in options:
        return find_gpu(options["gpu"])
    return this_machine() or find_gpu(DEFAULT)
