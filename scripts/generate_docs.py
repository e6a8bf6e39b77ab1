"""Write docs/configuration.md from the dataclasses of the run schema, or check it is up to date.

python scripts/generate_docs.py
python scripts/generate_docs.py --check     # exit 1 and a diff when it is stale
"""

import difflib
import sys
from pathlib import Path

from qlora_kit.cli.schema import Section, sections, type_text

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_HEAD = """\
# Configuration of a run

<!-- Written by scripts/generate_docs.py from qlora_kit/train/config.py. Do not edit by hand. -->

One YAML file describes a run: `qlora-kit train run.yaml`. Every key below is a key of that file
and a flag that wins over it: `--train.epochs 2` is `train: {epochs: 2}`. Lists may be written
`a,b` on the command line. `qlora-kit train run.yaml --print-config` shows a file complete with
its defaults; unknown keys are refused with the nearest known name. Relative paths start at the
folder the command runs in.

YAML is read by the rules of version 1.2: `yes` and `no` are words, `2e-4` is a number.
"""


def render() -> str:
    """The text of docs/configuration.md."""
    return _HEAD + "".join(_section(section) for section in sections())


def _section(section: Section) -> str:
    title = f"`{section.name}`" if section.name else "Top level"
    lines = [f"\n## {title}\n", section.doc, "", "| key | type | default | meaning |"]
    lines.append("|---|---|---|---|")
    for field in section.fields:
        default = "required" if field.required else f"`{field.default_text or repr('')}`"
        cells = (f"`{field.key}`", type_text(field.hint), default, field.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Write or check the file; see the module's text."""
    text = render()
    if argv == ["--check"]:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current == text:
            return 0
        names = (str(TARGET), "generated")
        diff = difflib.unified_diff(current.splitlines(), text.splitlines(), *names, lineterm="")
        print("\n".join(diff))
        print("docs/configuration.md is stale: run python scripts/generate_docs.py")
        return 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
