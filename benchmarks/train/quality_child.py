"""The fresh process of one training of `benchmarks.train.quality`: losses of every step.

python -m benchmarks.train.quality_child JOB.json
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora_kit.bench.child import BUILDERS
from qlora_kit.bench.subject import Batch, Build, NotPossible, Point, Stage

_EVERY = 50


def read_batches(file: str, device: str) -> list[Batch]:
    """The batches that `quality.write_batches` wrote, in order."""
    found: dict[int, Batch] = {}
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  not a dictionary
            step, name = key.split(".")
            found.setdefault(int(step), {})[name] = tensors.get_tensor(key).to(device)
    return [found[step] for step in sorted(found)]


def train(work: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Build, save the start if asked for, train.

    Args:
        work: the job.
        stage: told what ends.

    Returns:
        What the parent records.
    """
    build = Build(**work["build"])
    module = importlib.import_module(BUILDERS[build.impl])
    try:
        subject = module.build(build, stage)
    except NotPossible as reason:
        return {"skipped": str(reason)}
    if work["save_start"]:
        subject.save(Path(work["save_start"]))
    batches = read_batches(work["batches"], build.device)
    losses: list[torch.Tensor] = []
    policy = work["policy"] if build.impl == "qlora_kit" else ""
    with subject.prepare(Point(batch=1, seq=1, policy=policy)) as step:
        began = time.perf_counter()
        for index, batch in enumerate(batches):
            loss = subject.step(batch)
            losses.append(loss)
            if (index + 1) % _EVERY == 0:
                stage(f"step {index + 1}", f"loss {float(loss):.4f}")
        values = [float(loss) for loss in losses]
    stage("done", f"{len(values)} steps")
    facts = {} if subject.facts is None else subject.facts()
    seconds = round(time.perf_counter() - began, 2)
    return {"losses": values, "seconds": seconds, "step": step, **facts}


def main() -> None:
    """Read the job, do it, write the result."""
    stage = Stage()
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = train(work, stage)
    Path(work["out"]).write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
