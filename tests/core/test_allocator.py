"""Segments grow unless the user, the system or an early start of CUDA is against it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_kit.bench.process import import_path
from qlora_kit.core import allocator
from qlora_kit.core.allocator import (
    FIXED,
    GROWING,
    NAMES,
    growing_segments,
    segments_grow,
    use_growing_segments,
)
from qlora_kit.core.errors import UserError
from qlora_kit.train.config import DataConfig, ModelConfig, RunConfig
from qlora_kit.train.run import run_training

NEW, OLD = NAMES


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Linux without settings, whatever this one has; afterwards as before."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    return monkeypatch


@pytest.mark.parametrize(
    ("release", "name"),
    [("2.9.1+cu128", OLD), ("2.10.0", OLD), ("2.11.0+cu130", NEW), ("2.13.0", NEW), ("3.0", NEW)],
)
def test_the_name_that_this_torch_reads(clean: pytest.MonkeyPatch, release: str, name: str) -> None:
    """2.9 ignores the option under the new name, and 2.11 does not."""
    clean.setattr(allocator, "version", lambda _: release)
    assert growing_segments({}) == {name: GROWING}


def test_users_and_systems_that_have_their_own(clean: pytest.MonkeyPatch) -> None:
    """Nothing is added to what a user set, be it off; nor elsewhere than on Linux."""
    for name in NAMES:
        assert growing_segments({name: "expandable_segments:False"}) == {}
        assert growing_segments({name: ""}) == {}
    assert growing_segments({"OTHER": "1"}) != {}
    clean.setattr(allocator.sys, "platform", "win32")
    assert growing_segments({}) == {}


def test_a_process_gets_them_once(clean: pytest.MonkeyPatch) -> None:
    """In its environment, where torch and the processes it starts find them."""
    assert use_growing_segments()
    assert [os.environ[name] for name in NAMES if name in os.environ] == [GROWING]
    assert use_growing_segments()


@pytest.mark.parametrize("can_be_told", [True, False])
def test_after_cuda_has_started(clean: pytest.MonkeyPatch, can_be_told: bool) -> None:
    """Torch has read its settings by then and is told once; one that is not says so in records."""
    told: list[str] = []
    setters = {"_accelerator_setAllocatorSettings": told.append} if can_be_told else {}
    started = SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: True), _C=SimpleNamespace(**setters)
    )
    clean.setitem(sys.modules, "torch", started)
    assert use_growing_segments() is can_be_told
    assert told == [GROWING] * can_be_told
    assert any(name in os.environ for name in NAMES) is can_be_told
    use_growing_segments()
    assert len(told) == can_be_told


def test_after_cuda_has_started_users_have_their_own(clean: pytest.MonkeyPatch) -> None:
    """Torch is told nothing where a variable is set."""
    told: list[str] = []
    started = SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: True),
        _C=SimpleNamespace(_accelerator_setAllocatorSettings=told.append),
    )
    clean.setitem(sys.modules, "torch", started)
    clean.setenv(OLD, "max_split_size_mb:64")
    assert not use_growing_segments()
    assert not told


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA has started already")
def test_a_run_from_python_asks(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything else."""
    run = RunConfig(
        model=ModelConfig(path=str(tmp_path / "none")), data=DataConfig(train="t.jsonl")
    )
    with pytest.raises(UserError):
        run_training(run)
    assert segments_grow()


def test_what_settings_say() -> None:
    """The alias wins where both are set, as it does in torch."""
    assert segments_grow({NEW: f"max_split_size_mb:64, {GROWING}"})
    assert not segments_grow({})
    assert not segments_grow(FIXED)
    assert not segments_grow({NEW: GROWING, OLD: "expandable_segments:False"})


COMMAND = """
import os, sys
{setup}
sys.argv = ["qlora-kit", {command!r}, "--help"]
from qlora_kit.cli import main
def see(_words):
    print("torch" in sys.modules, "expandable_segments:True" in os.environ.values())
    return 0
main.main = see
main.entry()
"""


@pytest.mark.parametrize(
    ("command", "setup", "seen"),
    [
        ("train", "", "False True"),
        ("eval", "", "False True"),
        ("bench", "", "False False"),  # asks for each of its processes
        ("train", "os.environ['PYTORCH_ALLOC_CONF'] = 'expandable_segments:False'", "False False"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="only there do segments grow")
def test_commands_ask_before_torch_is_imported(command: str, setup: str, seen: str) -> None:
    """As users start them."""
    environment = {k: v for k, v in os.environ.items() if k not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(command=command, setup=setup)],
        env={**environment, "PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == seen


def test_processes_of_benchmarks(clean: pytest.MonkeyPatch) -> None:
    """Ours and full fine-tuning as users run them; other libraries as they come."""
    from qlora_kit.bench import full, ours
    from qlora_kit.bench.peers import peft_bnb
    from qlora_kit.bench.subject import Build

    build = Build(impl="qlora_kit", model="tiny", checkpoint="")
    assert GROWING in ours.environment(build).values()
    assert GROWING in full.environment(build).values()
    assert GROWING not in peft_bnb.environment(build).values()
    clean.setenv(NEW, "expandable_segments:False")
    assert GROWING not in ours.environment(build).values()


FREED = """
import torch
{ask}
half = [torch.empty(1 << 28, device="cuda") for _ in range(2)]
del half
whole = torch.empty(1 << 29, device="cuda")
print(torch.cuda.max_memory_reserved() >> 30)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grow", ["first", "late", ""])
def test_torch_takes_the_setting(grow: str) -> None:
    """Two tensors' memory serves one of twice the size, or it does not: 2 GiB or more.

    As it does where CUDA has started before.
    """
    asked = "from qlora_kit.core.allocator import use_growing_segments as use; use()"
    if grow == "late":
        asked = f"torch.ones(1, device='cuda'); {asked}"
    environment = {k: v for k, v in os.environ.items() if k not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", FREED.format(ask=asked if grow else "")],
        env={**environment, "PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == (2 if grow else 4)
