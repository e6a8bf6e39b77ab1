"""sanitize.sh believes a tool only after it has found what was planted and watched something."""

import os
import re
import subprocess

import pytest

from tests.scripts.loading import SCRIPTS

ROOT = SCRIPTS.parent
API_ERROR = (
    '========= Program hit CUDA_ERROR_INVALID_VALUE (error 1) due to "invalid argument" on CUDA '
    "API call to cuGetProcAddress_v2."
)
OVERRUN = """========= Invalid __global__ write of size 4 bytes
=========     at nf4_planted_overrun+0x70"""
RACE = """========= Error: Race reported between Write access at rms_norm_planted_race+0x60
=========     and Read access at rms_norm_planted_race+0xb0 [992 hazards]"""
CLEAN = {
    "memcheck": "hopper: 69 checks right\n========= ERROR SUMMARY: 0 errors",
    "racecheck": (
        "hopper: 69 checks right\n"
        "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    ),
}
FOUND = 97

PARTS = ["hopper", "dense", "losses"]
_SANITIZER = """#!/usr/bin/env bash
# Says what is in a file beside it, with the status that is in another.
here=$(dirname "$0") tool=$2
case "$*" in *--plant*) what=$tool.planted ;; *) what=$tool.clean ;; esac
[ -e "$here/$tool.${!#}" ] && what=$tool.${!#}
echo "$*" >> "$here/calls"
[ -e "$here/$what.slow" ] && sleep 20
cat "$here/$what"
exit "$(cat "$here/$what.status")"
"""
_PYTHON = """#!/bin/sh
case "$*" in
  *--list*) printf 'hopper\\ndense\\nlosses\\n' ;;
  *) echo hopper: 69 checks right ;;
esac
"""


def run_script(command, environment):
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=60
    )


@pytest.fixture
def sanitize(tmp_path):
    """Run the script with a tool that says what it is told; its status, output and calls."""

    def run(*tools, limit=20, **said):
        answers = {
            "memcheck.planted": (OVERRUN, FOUND),
            "racecheck.planted": (RACE, FOUND),
            "memcheck.clean": (CLEAN["memcheck"], 0),
            "racecheck.clean": (CLEAN["racecheck"], 0),
        } | {name.replace("_", "."): answer for name, answer in said.items()}
        for name, (text, status) in answers.items():
            (tmp_path / name).write_text(text + "\n")
            (tmp_path / f"{name}.status").write_text(str(status))
        for name, text in (("tool", _SANITIZER), ("python", _PYTHON)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        named = {"PYTHON": str(tmp_path / "python"), "COMPUTE_SANITIZER": str(tmp_path / "tool")}
        command = ["bash", str(SCRIPTS / "sanitize.sh"), *tools]
        environment = os.environ | {"SANITIZER_LIMIT": str(limit)} | named
        done = run_script(command, environment)
        calls = tmp_path / "calls"
        made = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stdout + done.stderr, made

    return run


def test_both_tools_clean(sanitize):
    status, output, calls = sanitize()
    assert status == 0, output
    for tool in ("memcheck", "racecheck"):
        assert f"== {tool} finds the planted" in output
        for part in PARTS if tool == "memcheck" else ("hopper", "losses"):
            assert re.search(rf"== {tool}, {part}: clean, \d+ s", output)
    made = [call.split()[-1] for call in calls]
    assert made == ["overrun", *PARTS, "race", "hopper", "losses"]
    assert "== racecheck, dense: left out" in output
    assert ["--every-lane" in call for call in calls] == [False] * 5 + [True] * 2
    for call in calls:
        assert f"--report-api-errors no --error-exitcode {FOUND}" in call or (
            f"--error-exitcode {FOUND} --report-api-errors no" in call
        )


def test_only_the_tools_named_run(sanitize):
    status, _, calls = sanitize("racecheck")
    assert status == 0
    assert {call.split()[1] for call in calls} == {"racecheck"}


@pytest.mark.parametrize(
    "said",
    [
        (API_ERROR, FOUND),  # what made the check prove nothing
        (OVERRUN, 0),
        (OVERRUN.replace("nf4_planted_overrun", "some_kernel"), FOUND),
        (OVERRUN.replace("write", "read"), FOUND),
    ],
    ids=["API errors alone", "no status", "another kernel", "another mistake"],
)
def test_a_planted_mistake_must_be_named(sanitize, said):
    status, output, calls = sanitize("memcheck", memcheck_planted=said)
    assert status == 1
    assert "did not find the planted overrun" in output
    assert len(calls) == 1  # nothing is said of the kernels


@pytest.mark.parametrize("words", ["Error: Race reported between", "Potential RAW hazard detected"])
def test_a_race_in_either_wording(sanitize, words):
    said = RACE.replace("Error: Race reported between", words)
    assert sanitize("racecheck", racecheck_planted=(said, FOUND))[0] == 0
    status, output, _ = sanitize("racecheck", racecheck_planted=(API_ERROR, FOUND))
    assert status == 1
    assert "did not find the planted race" in output


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ((CLEAN["memcheck"], FOUND), "findings"),
        ((CLEAN["memcheck"], 3), "failed with 3"),
        ((CLEAN["memcheck"].replace("69", "0"), 0), "nothing ran"),
        (("========= ERROR SUMMARY: 0 errors", 0), "nothing ran"),
        (("hopper: 69 checks right", 0), "nothing ran, or no summary"),
        (
            (CLEAN["memcheck"].replace("0 errors", "2 errors"), 0),
            "nothing ran, or no summary of none",
        ),
    ],
)
def test_clean_is_not_said_lightly(sanitize, said, why):
    status, output, _ = sanitize("memcheck", memcheck_clean=said)
    assert status == 1
    assert f"== memcheck, hopper: {why}" in output
    assert "== memcheck: not clean: hopper dense losses" in output
    assert "clean," not in output


def test_one_part_says_nothing_of_another(sanitize):
    gave_up = "Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception."
    status, output, calls = sanitize("racecheck", racecheck_hopper=(gave_up, 255))
    assert status == 1
    assert "== racecheck, hopper: failed with 255" in output
    assert gave_up in output
    assert "== racecheck, losses: clean" in output
    assert "== racecheck: not clean: hopper\n" in output
    assert len(calls) == 3


def test_a_run_that_does_not_end_is_stopped(sanitize, tmp_path):
    (tmp_path / "memcheck.clean.slow").touch()
    status, output, _ = sanitize("memcheck", limit=1)
    assert status == 1
    assert "stopped after 1 s" in output


def test_without_the_tool_it_is_named():
    environment = os.environ | {"COMPUTE_SANITIZER": "/nowhere"}
    command = ["bash", str(SCRIPTS / "sanitize.sh")]
    done = run_script(command, environment)
    assert done.returncode == 2
    assert "needs compute-sanitizer" in done.stderr


def test_every_kernel_is_watched_and_run():
    """The tool picks kernels by the beginnings of their names; the driver calls each op."""
    names = re.search(r"for name in (.*); do", (SCRIPTS / "sanitize.sh").read_text())[1].split()
    driver = (ROOT / "tests/ops/sanitize.py").read_text()
    for folder in sorted((ROOT / "kernels").iterdir()):
        if folder.is_dir() and folder.name != "common":
            assert any(f"{folder.name}_".startswith(name) for name in names), folder.name
            assert f"qlora_kit.ops.{folder.name}" in driver, folder.name
