"""The fresh process of one training of `benchmarks.train.quality`: losses of every step.

python -m benchmarks.train.quality_child JOB.json
"""

import hashlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qlora_kit.bench.child import BUILDERS
from qlora_kit.bench.subject import Batch, Build, NotPossible, Point, Stage

_EVERY = 50
_PREFIX = "base_model.model."
_WRAPPED = (".base_layer", ".base")
"""What adapters add to the name of the linear they wrap: PEFT's, ours."""


def read_batches(file: str, device: str) -> list[Batch]:
    """The batches that `quality.write_batches` wrote, in order."""
    found: dict[int, Batch] = {}
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  not a dictionary
            step, name = key.split(".")
            found.setdefault(int(step), {})[name] = tensors.get_tensor(key).to(device)
    return [found[step] for step in sorted(found)]


def code_hashes(model: nn.Module) -> dict[str, str]:
    """Hash of every 4-bit linear's codes and 8-bit scales, whichever library holds them.

    Args:
        model: with adapters or without.

    Returns:
        The linear's name in the model without adapters, to hexadecimal digits.
    """
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))  # adapters forward to these
        weight = own.get("weight")
        if weight is None or weight.dtype != torch.uint8:
            continue
        state = getattr(weight, "quant_state", None)  # bitsandbytes'
        scales = own["weight_absmax"] if state is None else state.absmax
        digest = hashlib.sha256()
        for tensor in (weight, scales):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        plain = name.removeprefix(_PREFIX)
        for suffix in _WRAPPED:
            plain = plain.removesuffix(suffix)
        found[plain] = digest.hexdigest()[:16]
    return found


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
    codes = code_hashes(subject.model)
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
    return {"losses": values, "codes": codes, "seconds": seconds, "step": step, **facts}


def main() -> None:
    """Read the job, do it, write the result."""
    stage = Stage()
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = train(work, stage)
    Path(work["out"]).write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
