"""The command line as a user meets it: help, exit codes, messages without tracebacks."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_kit import __version__
from qlora_kit.cli import version
from qlora_kit.cli.main import COMMANDS, main
from qlora_kit.core.errors import DataError

HELP_SECONDS = 0.5


def cli(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-m", "qlora_kit.cli.main", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "-h"]])
def test_help_is_instant(words):
    """Best of three: other work on the machine is not what is measured."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert cli(*words).returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= HELP_SECONDS


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", ["40", "200"])
def test_help_fits_80_columns(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    try:
        code = main([*command.split(), "--help"])
    except SystemExit as stop:  # argparse's own way to end after its help
        code = stop.code
    text = capsys.readouterr().out
    assert code == 0
    assert text.startswith("usage: qlora-kit")
    assert max(map(len, text.splitlines())) <= 80


def test_top_level_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean `train`?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flag_is_refused(command, capsys):
    assert main([command, "--no-such-flag"]) == 2
    text = capsys.readouterr().err
    assert "--no-such-flag" in text
    assert "Traceback" not in text


def test_user_error_is_one_line_and_2():
    done = cli("train", "none.yaml")
    assert done.returncode == 2
    assert done.stderr == "qlora-kit: cannot read none.yaml: No such file or directory.\n"


@pytest.mark.parametrize("how", [(["--debug"], {}), ([], {"QLORA_KIT_DEBUG": "1"})])
def test_debug_shows_the_traceback(how):
    words, environment = how
    done = cli("train", "none.yaml", *words, **environment)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_bug_is_1_with_traceback_and_where_to_report(tmp_path):
    """An error that is nobody's input ends with 1, its traceback and a line on reporting."""
    code = (
        "from qlora_kit.cli import main, version\n"
        "def run(argv): raise ZeroDivisionError('ours')\n"
        "version.run = run\n"
        "import sys; sys.argv = ['qlora-kit', 'version']\n"
        "main.entry()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError: ours" in done.stderr
    assert "CONTRIBUTING.md" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("row 3 is empty"), 2, "qlora-kit: row 3 is empty\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "qlora-kit: [Errno 2] No such file: 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error, code, text, capsys, monkeypatch):
    def run(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(version, "run", run)
    assert main(["version"]) == code
    captured = capsys.readouterr().err
    assert text in captured
    assert "Traceback" not in captured


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m qlora_kit.cli.main train --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert main(["version"]) == 0
    assert "torch" in capsys.readouterr().out


def test_generated_documentation_is_current():
    script = Path(__file__).resolve().parents[2] / "scripts" / "generate_docs.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
