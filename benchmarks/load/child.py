"""The fresh process of one load: how long it takes, where the time goes, what memory it needs.

    python -m benchmarks.load.child JOB.json

`benchmarks.load.load` starts it, once per row. The clock starts when libraries are imported
and the GPU has a context, and stops when the GPU has done everything that was asked of it.
A breakdown wraps the steps of our load in timers and traces the GPU; it is a process of its
own, so that nothing of this counts in the others.
"""

import contextlib
import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from qlora_kit.bench.subject import Stage
from qlora_kit.bench.turns import alone, prepares, taken
from qlora_kit.core.memory import PeakMemory

GIB = 2**30
Load = Callable[[], Any]


def ours(folder: str, target: str, device: str) -> Load:
    """`qk.load`."""
    from qlora_kit.load.model import load
    from qlora_kit.quant.config import QuantConfig

    quant = QuantConfig() if target == "nf4" else None
    dtype = "bfloat16" if device == "cuda" else "float32"
    return lambda: load(folder, quant=quant, device=device, dtype=dtype)[0]


def ours_without_upload(folder: str, target: str, device: str) -> Load:
    """The same, with transformers taking every weight to the GPU: what our ring is worth."""
    from qlora_kit.load import hf_quantizer

    hf_quantizer.UPLOADED_TO = ()
    return ours(folder, target, device)


def transformers_door(folder: str, target: str, device: str) -> Load:
    """`AutoModelForCausalLM.from_pretrained` with our configuration."""
    from transformers import AutoModelForCausalLM

    from qlora_kit.load.hf_quantizer import NF4Config

    options: dict[str, Any] = {"quantization_config": NF4Config()} if target == "nf4" else {}
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, **options
    )


def bitsandbytes(folder: str, target: str, device: str) -> Load:
    """What PEFT's users do: transformers with bitsandbytes."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if target == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head"],
        )
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, **options
    )


def unsloth(folder: str, target: str, device: str) -> Load:
    """Unsloth's documented loader."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    return lambda: FastLanguageModel.from_pretrained(
        model_name=folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=target == "nf4"
    )


WAYS: dict[str, Callable[[str, str, str], Load]] = {
    "qlora_kit": ours,
    "qlora_kit_plain_copies": ours_without_upload,
    "qlora_kit_transformers_door": transformers_door,
    "peft": bitsandbytes,
    "unsloth": unsloth,
}
"""Who loads, by the name in the record."""


PHASES = (
    ("headers", "qlora_kit.load.model", "open_source"),
    ("headers", "qlora_kit.load.hf_quantizer", "read_headers"),
    ("headers", "qlora_kit.load.hf_quantizer", "stored_dtypes"),
    ("headers", "qlora_kit.load.hf_quantizer", "stored_weights"),
    ("empty modules", "qlora_kit.load.hf_quantizer", "swap"),
    ("allocator", "transformers.modeling_utils", "caching_allocator_warmup"),
    ("reading", "qlora_kit.checkpoint.upload", "Uploader._hand_over"),
    ("copying", "qlora_kit.checkpoint.upload", "Uploader._send"),
    ("waiting for copies", "qlora_kit.checkpoint.upload", "_Slot.wait"),
    ("copying", "qlora_kit.checkpoint.upload", "Uploader.upload"),
    ("dense weights", "transformers.core_model_loading", "_materialize_copy"),
    ("quantizing", "qlora_kit.load.conversion", "quantize_weight"),
    ("quantizing", "qlora_kit.load.conversion", "quantize_stack"),
    ("checking stored", "qlora_kit.load.conversion", "from_bnb_tensors"),
    ("waiting at the end", "qlora_kit.load.finite", "FiniteCheck.error"),
    ("finishing", "transformers.modeling_utils", "PreTrainedModel._finalize_model_loading"),
    ("tokenizer", "qlora_kit.load.model", "load_tokenizer"),
)
"""Phase, module and name of the functions a breakdown times. What a function spends in another
one of these is the other's; the rest is Python in between. Reading is waiting for the threads
that read. A 16-bit load runs on threads of transformers, whose seconds add up to more than passed.
"""
EMPTY_MODEL = "config and empty model"


class Timers:
    """Host seconds spent in functions, by phase."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]
        self._began = time.perf_counter()

    def start(self) -> None:
        """The load begins now."""
        self._began = time.perf_counter()

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added to a phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self.seconds[phase] += spent - self._inner.pop()
                self._inner[-1] += spent

        return timed

    def until(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; all that passed before it, and is in no phase, goes to one."""

        def reached(*args: Any, **kwargs: Any) -> Any:
            passed = time.perf_counter() - self._began
            self.seconds[phase] += passed - sum(self.seconds.values())
            return function(*args, **kwargs)

        return reached


@contextlib.contextmanager
def timed_phases() -> Iterator[Timers]:
    """Put timers around the steps of our load."""
    timers = Timers()
    with contextlib.ExitStack() as stack:

        def put(module: str, name: str, around: Callable[[Callable[..., Any]], Any]) -> None:
            owner: Any = importlib.import_module(module)
            *path, leaf = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            found = vars(owner)[leaf]
            made = around(getattr(owner, leaf))
            if isinstance(found, staticmethod):
                made = staticmethod(made)
            stack.enter_context(mock.patch.object(owner, leaf, made))

        for phase, module, name in PHASES:
            put(module, name, partial(timers.wrap, phase))
        before = "NF4HfQuantizer._process_model_before_weight_loading"
        put("qlora_kit.load.hf_quantizer", before, partial(timers.until, EMPTY_MODEL))
        yield timers


def gpu_seconds(profile: Any) -> dict[str, float]:
    """Busy seconds of the GPU by kind: copies to it, quantizing, everything else."""
    found: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        seconds = event.self_device_time_total / 1e6
        if not seconds:
            continue
        name = event.key
        if "HtoD" in name:
            kind = "copies_pinned" if "Pinned" in name else "copies_pageable"
        elif "nf4_quantize" in name:
            kind = "quantizing"
        else:
            kind = "other"
        found[kind] += seconds
    return dict(found)


def measure(job: dict[str, Any], stage: Stage) -> dict[str, object]:
    """Load once.

    Args:
        job: impl, source (folder), target, device, breakdown.
        stage: told when imports and the load end.

    Returns:
        The row's answers: seconds, GiB, and with a breakdown the phases.
    """
    gpu = job["device"] == "cuda"
    load = WAYS[job["impl"]](job["folder"], job["target"], job["device"])
    imported = stage("imports")
    if gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    ready = stage("context")
    profiler: Any = contextlib.nullcontext()
    if job["breakdown"] and gpu:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    phases = timed_phases() if job["breakdown"] else contextlib.nullcontext()
    with alone(), profiler, phases as timers, PeakMemory() as host:
        if timers is not None:
            timers.start()
        began = time.perf_counter()
        model = load()
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    stage("loaded", f"{seconds:.2f} s")
    row: dict[str, object] = {
        "turns": taken(),
        "import_s": imported,
        "context_s": ready - imported,
        "load_s": seconds,
        "host_peak_gib": host.growth_bytes / GIB,
        "host_before_gib": host.start_bytes / GIB,
    }
    if gpu:
        row["gpu_peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["gpu_peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        row["gpu_model_gib"] = torch.cuda.memory_allocated() / GIB
    if timers is not None:
        parts = dict(sorted(timers.seconds.items(), key=lambda item: -item[1]))
        row["phases_s"] = {**parts, "rest": seconds - sum(parts.values())}
    if gpu and job["breakdown"]:
        row["gpu_busy_s"] = gpu_seconds(profiler)
    del model
    return row


def main() -> None:
    """Measure the job in a file and write the row beside it."""
    stage = Stage()
    prepares()
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    path.with_suffix(".row").write_text(json.dumps(measure(job, stage)))


if __name__ == "__main__":
    main()
