"""`qlora-kit preview`: training examples token by token, and which tokens count in the loss."""

from collections.abc import Sequence

from qlora_kit.cli.logs import setup_logging
from qlora_kit.cli.run_config import load_config, parse_words
from qlora_kit.cli.run_help import run_help
from qlora_kit.core.errors import ConfigError

_USAGE = """\
qlora-kit preview RUN.yaml [--rows N] [--set NAME]
                         [--section.field VALUE ...]"""
_ABOUT = """\
Show examples as the model will see them: every token, and whether it counts in
the loss; then what was cut, packed or dropped. Takes the run file and the flags
of `qlora-kit train`. Only the tokenizer of the model is read."""
_OWN = {
    "--rows N": "examples to show (default 3)",
    "--set NAME": "train (default), eval, or a name of data.eval_sets",
    "--config RUN.yaml": "another way to name the run file",
    "-h, --help": "show this text",
}


def run(argv: Sequence[str]) -> int:
    """Show examples; see `qlora-kit preview --help`.

    Args:
        argv: the words after `qlora-kit preview`.

    Returns:
        0.

    Raises:
        ConfigError: --rows is not a number.
    """
    if "-h" in argv or "--help" in argv:
        print(run_help(_USAGE, _ABOUT, _OWN), end="")
        return 0
    line = parse_words(argv, "preview", options=("rows", "set"))
    config = load_config(line, "preview")
    rows = line.options.get("rows", "3")
    if not rows.isdecimal():
        raise ConfigError(f"--rows takes a whole number, got {rows!r}.")

    setup_logging()
    from qlora_kit.cli.dry_run import load_tokenizer
    from qlora_kit.train.data.dataset import build_dataset
    from qlora_kit.train.data.preview import print_preview

    tokenizer = load_tokenizer(config.model)
    dataset = build_dataset(
        config.data,
        tokenizer,
        line.options.get("set", "train"),
        task=config.model.task,
        labels=config.model.labels,
        seed=config.train.seed,
    )
    print_preview(dataset, tokenizer, rows=int(rows), batch_size=config.train.batch_size)
    return 0
