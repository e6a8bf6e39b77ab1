"""What methods like LoRA cost in fused decoder layers, each beside LoRA.

    python -m benchmarks.block.methods [--batch 4] [--seq 2048] [--layers 4] [--rounds 9]
                                       [--seconds 120] [--out FOLDER]

A few layers of an 8B model, random weights, NF4, rank 16 on all linears; no embedding, no head,
no optimizer. First the gradients of fused layers and of the model's own code, both in bfloat16,
are compared with those of a float32 copy of the model on the same batch. `error` and `own_error`
are their distances in norm, for the kind of parameter where the fused ones compare worst: about 1%,
which is rounding. The benchmark stops where a fused error is more than 1.3 of the own code's, and
where that is more than 5%: then rounding drowns everything, and nothing can be compared.

Then the methods take turns: in every round each runs a few steps of forward and backward, the
order turned by one from round to round, so that a card that grows warm slows all of them alike.
`ms` are milliseconds per layer, the median over rounds and the least and most; `over_lora` is the
median of the ratio to LoRA in the same round. `host_ms` is what Python takes to launch a step's
work, per layer: where it comes near `ms`, the GPU waits. AdaLoRA's time has its term in the loss
and its scores in it. `own_code` is LoRA in the model's own code, for comparison.

Rounds that begin after `--seconds` are left out. Without a GPU all of it runs on a tiny model,
which tests the benchmark and nothing else.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.block.paths import Clock, allocated, distance, make_model
from benchmarks.harness.record import write_record
from qlora_kit.adapters.adalora.config import RankBudget
from qlora_kit.adapters.adalora.layer import AdaLoRALinear, add_orthogonality
from qlora_kit.adapters.adalora.rank_allocator import RankAllocator
from qlora_kit.bench.timing import device
from qlora_kit.block.install import FusedBlocks, fuse_blocks
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.attention.transformers_door import unpadded_inputs

METHODS = ("lora", "lora_fa", "adalora", "dora", "pissa")
POLICIES = ("recompute_elementwise", "recompute_all")
OWN_CODE = "own_code"
GIB = 2**30
MOST_OWN_ERROR = 0.05
"""Distance of the own code's gradients from float32's: beyond it the batch tells nothing."""
MOST_OVER_OWN = 1.3
"""Of a fused distance over the own code's."""
STEPS = 3
"""Of a turn; the first is not counted."""


@dataclass(slots=True)
class Case:
    """One method with its model."""

    method: str
    model: nn.Module
    fused: FusedBlocks | None = None
    allocator: RankAllocator | None = None
    error: float = 0.0
    own_error: float = 0.0
    worst: str = ""
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    kept_kb: float = 0.0
    peak_gib: float = 0.0

    @property
    def pieces(self) -> list[AdaLoRALinear]:
        """AdaLoRA's."""
        return [m for m in self.model.modules() if isinstance(m, AdaLoRALinear)]


def make_case(method: str, layers: int) -> Case:
    """A model whose adapter looks trained."""
    torch.manual_seed(0)
    model = make_model(layers, "lora" if method == OWN_CODE else method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_E"):
                nn.init.normal_(parameter, 0.0, 5.0)
            elif name.endswith("lora_magnitude"):
                parameter.mul_(1.0 + 0.1 * torch.rand_like(parameter))
    case = Case(method, model)
    if case.pieces:
        budget = RankBudget(target_rank=8)
        case.allocator = RankAllocator(case.pieces, budget, target_rank=8)
    return case


def batch_of(model: nn.Module, batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """Hidden states and the gradient of the result."""
    generator = torch.Generator(device()).manual_seed(0)
    shape = (2, batch, seq, model.config.hidden_size)
    x, dy = torch.randn(shape, generator=generator, device=device(), dtype=torch.bfloat16)
    return x, dy


def one_step(case: Case, x: Tensor, dy: Tensor, update: int = 1) -> None:
    """Forward and backward, and what the method adds to them."""
    model = case.model
    model.zero_grad(set_to_none=True)
    before = allocated()
    mask = unpadded_inputs() if x.dtype == torch.bfloat16 else {}  # eager attention needs its own
    y = model.model(inputs_embeds=x, use_cache=False, **mask).last_hidden_state
    tokens = x.shape[0] * x.shape[1] * model.config.num_hidden_layers
    case.kept_kb = max(allocated() - before - y.nbytes, 0) / tokens / 1e3
    y.backward(dy)
    if case.allocator is not None:
        add_orthogonality(case.pieces, 0.1)
        case.allocator.observe(update, updates=10_000)


def gradients_by_kind(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Gradients in float32, by the last part of their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.setdefault(name.rpartition(".")[2], {})[name] = parameter.grad.float()
    return found


def in_float32(model: nn.Module) -> nn.Module:
    """A copy that computes in float32, with the very weights that the model computes with."""
    exact = copy.deepcopy(model)
    for name, module in list(exact.named_modules()):
        if isinstance(module, NF4Linear):
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(module.dequantize(torch.bfloat16), requires_grad=False)
            exact.set_submodule(name, dense)
    exact.set_attn_implementation("eager")
    return exact.float()


def check(case: Case, batch: int, seq: int) -> None:
    """Compare fused layers and the model's own code with float32, then leave them fused."""
    x, dy = batch_of(case.model, batch, seq)
    if case.method == OWN_CODE:
        return
    exact = in_float32(case.model)
    one_step(Case(case.method, exact), x.float(), dy.float())
    wanted = gradients_by_kind(exact)
    del exact
    one_step(Case(case.method, case.model), x, dy)
    own = gradients_by_kind(case.model)
    case.fused = fuse_blocks(case.model)
    one_step(Case(case.method, case.model), x, dy)
    found = gradients_by_kind(case.model)
    errors = {k: (distance(found[k], wanted[k]), distance(own[k], wanted[k])) for k in wanted}
    case.worst = max(errors, key=lambda kind: errors[kind][0] / errors[kind][1])
    case.error, case.own_error = errors[case.worst]
    told = ", ".join(f"{kind} {a:.2%} (own code {b:.2%})" for kind, (a, b) in errors.items())
    print(f"{case.method}: {told} from float32", flush=True)
    if not max(b for _, b in errors.values()) < MOST_OWN_ERROR:
        raise SystemExit(
            f"{case.method}: the own code is too far from float32 to compare. Stopped."
        )
    if not case.error <= MOST_OVER_OWN * case.own_error:
        raise SystemExit(
            f"{case.method} is wrong: {case.worst} is {case.error:.1%} off, the model's own code "
            f"{case.own_error:.1%}. Stopped."
        )


def turn(case: Case, x: Tensor, dy: Tensor, clock: Clock) -> None:
    """A few steps of one method."""
    layers, times, host = case.model.config.num_hidden_layers, [], []
    for _ in range(STEPS):
        if device() == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, began, begin = allocated(), time.perf_counter(), clock.mark()
        one_step(case, x, dy, update=2)
        host.append((time.perf_counter() - began) * 1e3 / layers)
        times.append(clock.ms(begin, clock.mark()) / layers)
        case.peak_gib = (allocated(peak=True) - before) / GIB
    case.model.zero_grad(set_to_none=True)
    case.ms.append(statistics.median(times[1:]))
    case.host_ms.append(statistics.median(host[1:]))


def rows_of(cases: Sequence[Case], policy: str, sizes: dict[str, int]) -> list[dict[str, object]]:
    """The record's rows of one policy."""
    lora = next(case for case in cases if case.method == "lora").ms
    rows = []
    for case in cases:
        ratios = [own / other for own, other in zip(case.ms, lora, strict=True)]
        rows.append(
            {"method": case.method, "policy": policy, **sizes, "rounds": len(case.ms)}
            | {"ms_median": statistics.median(case.ms)}
            | {"ms_min": min(case.ms), "ms_max": max(case.ms)}
            | {"over_lora": statistics.median(ratios)}
            | {"over_lora_min": min(ratios), "over_lora_max": max(ratios)}
            | {"host_ms": statistics.median(case.host_ms)}
            | {"kept_kb": case.kept_kb, "peak_gib": case.peak_gib}
            | {"error": case.error, "own_error": case.own_error, "worst": case.worst}
        )
    return rows


def run_policy(
    cases: Sequence[Case], policy: str, rounds: int, sizes: dict[str, int], until: float
) -> list[dict[str, object]]:
    """Take turns under one policy."""
    x, dy = batch_of(cases[0].model, sizes["batch"], sizes["seq"])
    clock = Clock()
    for case in cases:
        case.ms, case.host_ms = [], []
        if case.fused is not None:
            case.fused.set_policy(policy)
        one_step(case, x, dy)  # compiles, allocates
    for index in range(rounds):
        if index and time.perf_counter() > until:
            print(f"{policy}: {rounds - index} rounds left out", flush=True)
            break
        for place in range(len(cases)):
            turn(cases[(place + index) % len(cases)], x, dy, clock)
    return rows_of(cases, policy, sizes)


def main(words: list[str] | None = None) -> None:
    """Check, measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=120, help="start no round after these")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record")
    arguments = parser.parse_args(words)
    began = time.perf_counter()
    gpu = device() == "cuda"
    batch, seq = (arguments.batch, arguments.seq) if gpu else (2, 40)
    sizes = {"batch": batch, "seq": seq, "layers": arguments.layers}
    cases = [make_case(method, arguments.layers) for method in METHODS]
    for case in cases:
        check(case, 1, min(seq, 1024))
    print(f"made and checked in {time.perf_counter() - began:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    for index, policy in enumerate(POLICIES):
        share = arguments.seconds * (index + 1) / len(POLICIES)
        own = [make_case(OWN_CODE, arguments.layers)] if index == 0 else []
        rows += run_policy([*cases, *own], policy, arguments.rounds, sizes, began + share)
        del own
    write_record("block_methods", rows, folder=arguments.out)
    print(f"\n{'policy':22} {'method':9} ms/layer (least to most)  over LoRA (least to most)  "
          "host ms  kept KB  peak GiB   error")  # fmt: skip
    for row in rows:
        print(
            f"{row['policy']:22} {row['method']:9} {row['ms_median']:8.3f} "
            f"({row['ms_min']:.3f} to {row['ms_max']:.3f}) {row['over_lora']:9.3f} "
            f"({row['over_lora_min']:.3f} to {row['over_lora_max']:.3f}) {row['host_ms']:10.2f} "
            f"{row['kept_kb']:8.1f} {row['peak_gib']:9.2f} {row['error']:7.2%}"
        )


if __name__ == "__main__":
    main()
