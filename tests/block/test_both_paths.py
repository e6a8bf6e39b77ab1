"""The two ways through a decoder layer, compiled and fused, give one gradient: that of plain code.

Bounds as in test_gradients.py, 64 units of rounding, against float64 on the decoded weights.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from qlora_kit.block.compiled import compile_layers
from qlora_kit.block.install import fuse_blocks
from qlora_kit.ops.attention.rule import Documents
from qlora_kit.ops.attention.transformers_door import register
from tests.block.helpers import FAMILIES, METHODS, Gradients, errors, gradients, make, truth_of
from tests.block.helpers import maskless as unmasked
from tests.block.test_rows import add_gradients, one_by_one, packed, padded, together

UNIT = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def of_rows(model: PreTrainedModel, rows: dict[str, Tensor]) -> list[Gradients]:
    """Of packed rows, and of rows padded on the right, which need no mask."""
    found = [together(model, rows, Documents.from_positions(rows["position_ids"]))]
    ids, labels, _ = padded("right")
    model.zero_grad()
    add_gradients(model, ids, labels, **unmasked())
    return [*found, gradients(model)]


@pytest.mark.parametrize("method", ["lora", "lora_fa"])
@pytest.mark.parametrize(
    "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_compiled_and_fused_gradients_are_the_models_own(family: str, method: str) -> None:
    """Packed and padded, without a graph break; an adapter 0.1% off is found."""
    model, adapter = make(family, METHODS[method], dtype=torch.float32, nf4=True)
    rows, exact = packed(), truth_of(model)
    wanted = [one_by_one(exact, rows)]
    ids, labels, mask = padded("right")
    exact.zero_grad()
    add_gradients(exact, ids, labels, attention_mask=mask, use_cache=False)
    wanted.append(gradients(exact))
    model.set_attn_implementation(register())
    layers = compile_layers(model, backend="aot_eager")
    compiled = of_rows(model, rows)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0
    layers.remove()
    fused = fuse_blocks(model)
    for found, ours, truth in zip(compiled, of_rows(model, rows), wanted, strict=True):
        assert max(errors(found, truth)) < UNIT
        assert max(errors(ours, truth)) < UNIT
        assert max(errors(found, ours)) < 2 * UNIT
    fused.remove()

    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.001)
    wrong = [of_rows(model, rows)]
    fuse_blocks(model)
    wrong.append(of_rows(model, rows))
    for found in wrong:
        assert min(max(errors(a, b)) for a, b in zip(found, wanted, strict=True)) > 10 * UNIT


CHILD = """
import json, torch
from torch._dynamo.utils import counters
from qlora_kit.block.compiled import compile_layers
from tests.block.helpers import loss_and_gradients, make
model, _ = make("llama", dtype=torch.float32, nf4=True)
model.set_attn_implementation("sdpa")
compile_layers(model, "recompute_elementwise")
loss_and_gradients(model, use_cache=False)
print(json.dumps(counters["inductor"]))
"""


@pytest.mark.slow
def test_a_second_run_finds_the_code_of_the_first(tmp_path: Path) -> None:
    """Two layers are one forward and one backward graph, whose code a later process loads."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(2):
        words = [sys.executable, "-c", CHILD]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert (found[0]["fxgraph_cache_miss"], found[0].get("fxgraph_cache_hit", 0)) == (2, 0)
    assert (found[1].get("fxgraph_cache_miss", 0), found[1]["fxgraph_cache_hit"]) == (0, 2)
