"""`qlora-kit version`: this package's version, and those it runs with."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from qlora_kit import __version__
from qlora_kit.cli.arguments import Parser

PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "peft", "datasets")


def run(argv: Sequence[str]) -> int:
    """Print versions; see `qlora-kit version --help`.

    Args:
        argv: the words after `qlora-kit version`.

    Returns:
        0.
    """
    parser = Parser(
        "version", "[--short]", "Print the version of qlora_kit and of what it runs with."
    )
    parser.add_argument("--short", action="store_true", help="only qlora_kit's version")
    options = parser.parse_args(argv)
    if options.short:
        print(__version__)
        return 0
    rows = [("qlora_kit", __version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, installed_version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    for name, text in rows:
        print(f"{name:<14}{text}")
    return 0
