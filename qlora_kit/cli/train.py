"""`qlora-kit train`: one fine-tuning run from a YAML file, every field a flag as well."""

from collections.abc import Sequence

from qlora_kit.cli.logs import quiet_progress, setup_logging
from qlora_kit.cli.run_config import load_config, parse_words, to_yaml
from qlora_kit.cli.run_help import run_help

_USAGE = """\
qlora-kit train RUN.yaml [--section.field VALUE ...]
       qlora-kit train RUN.yaml --dry-run"""
_ABOUT = """\
Fine-tune as RUN.yaml says; flags win over the file. Every field below is a
key of the file, too: `--train.epochs 2` is `train: {epochs: 2}`. Lists are
written `a,b` or [a, b], mappings {a: b}. Relative paths start at the folder
the command runs in."""
_OWN = {
    "--config RUN.yaml": "another way to name the run file",
    "--dry-run": "read the model's header and the data, print what would run, and stop",
    "--print-config": "print the complete run file and stop",
    "-h, --help": "show this text",
}


def run(argv: Sequence[str]) -> int:
    """Train; see `qlora-kit train --help`.

    Args:
        argv: the words after `qlora-kit train`.

    Returns:
        0.
    """
    if "-h" in argv or "--help" in argv:
        print(run_help(_USAGE, _ABOUT, _OWN), end="")
        return 0
    line = parse_words(argv, "train", switches=("dry-run", "print-config"))
    config = load_config(line, "train")
    if "print-config" in line.options:
        print(to_yaml(config), end="")
        return 0
    setup_logging()
    if "dry-run" in line.options:
        from qlora_kit.cli.dry_run import dry_run

        dry_run(config)
        return 0
    from qlora_kit.train.run import run_training

    quiet_progress()
    run_training(config)
    return 0
