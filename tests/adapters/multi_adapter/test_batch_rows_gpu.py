"""Rows of different adapters on a GPU: bfloat16, against float64 on the same decoded weights."""

import pytest
import torch

from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.multi_adapter.batch_rows import BatchRows
from qlora_kit.adapters.multi_adapter.pieces import HeldPair, SharedLinear
from tests.adapters.bases import BF16_EPS, make_linear, relative_error

pytestmark = pytest.mark.gpu

K, N = 1024, 768
NAMES = ("b", None, "a", "c", "a", None)


@pytest.mark.parametrize("form", ["masked", "grouped", "auto"])
@pytest.mark.parametrize("tokens", [1, 33, 256])
@pytest.mark.parametrize("kind", ["nf4", "linear", "nf4_conv1d"])
def test_every_row_matches_float64(kind: str, tokens: int, form: str) -> None:
    device = "cuda"
    torch.manual_seed(0)
    base, weight = make_linear(kind, K, N, torch.bfloat16)
    base, weight = base.to(device), weight.to(device)
    if kind.startswith("nf4"):
        weight = base.dequantize(torch.bfloat16).double()
    shared, pairs = SharedLinear(base, "proj"), {}
    for name, rank in (("a", 16), ("b", 8), ("c", 3)):
        a, b = torch.randn(rank, K) / K**0.5, torch.randn(N, rank) / rank**0.5
        pairs[name] = LowRank(a.to(device), b.to(device), 2.0)
        shared.hold(name, HeldPair(pairs[name], torch.device(device)))
    x = torch.randn(len(NAMES), tokens, K, device=device).bfloat16()
    rows = BatchRows(NAMES, form=form)
    with torch.no_grad():
        shared.choose(rows)
        found, plain = shared(x), base(x)
    for row, name in enumerate(NAMES):
        wanted = x[row].double() @ weight.T + base.bias.double()
        if name is None:
            assert torch.equal(found[row], plain[row])
            continue
        for other, pair in pairs.items():
            own = wanted + x[row].double() @ pair.delta().double().T
            # A, B, z and y are rounded
            assert (relative_error(found[row], own) < 2 * BF16_EPS) == (other == name)
