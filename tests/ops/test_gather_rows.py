"""Every backend of gather_rows gives a table's own bits; ids outside of it give NaN."""

import pytest
import torch

from qlora_kit.core.errors import ShapeError, UserError
from qlora_kit.core.pinned import pinned_copy
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.gather_rows import cuda
from qlora_kit.ops.gather_rows.op import gather_rows, never_waits
from tests.ops.rows import device_of

BACKENDS = available_backends("gather_rows")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)
WIDTHS = [8, 16, 24, 264, 2056, 8192, 5, 0]
IDS = [(), (1,), (0,), (37,), (2, 19), (3, 1, 5)]


def make_table(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits: also those of NaN, infinities and subnormal numbers."""
    if not width:
        return torch.empty(rows, 0, dtype=dtype)
    generator = torch.Generator().manual_seed(rows + width)
    size = torch.empty((), dtype=dtype).element_size()
    found = torch.randint(0, 256, (rows, width * size), dtype=torch.uint8, generator=generator)
    return found.view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes on the CPU: NaN equals itself."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether shapes, dtypes and all bits agree."""
    alike = got.shape == wanted.shape and got.dtype == wanted.dtype
    return alike and torch.equal(bits(got), bits(wanted))


def places(table: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
    """The table where ids of a device find it."""
    found = {"beside": table.to(device)}
    if device == "cuda" and table.numel():
        found |= {"plain": table, "locked": table.pin_memory(), "registered": pinned_copy(table)}
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_the_tables_bits(width, dtype, backend):
    device = device_of(backend)
    table = make_table(41, width, dtype)
    for name, place in places(table, device).items():
        for shape in IDS:
            ids = torch.randint(0, 41, shape, generator=torch.Generator().manual_seed(len(shape)))
            with force_backend(backend):
                got = gather_rows(place, ids.to(device))
            assert (got.device.type, got.is_contiguous()) == (device, True)
            assert same(got, table[ids]), (name, shape)
            if ids.numel() and width:
                assert not same(got, table[(ids + 1) % 41]), "another row would be seen"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ids_outside_give_nan(dtype, backend):
    """All bits set, and the rows beside are right; nothing outside of the table is read."""
    device = device_of(backend)
    ids = torch.tensor([0, 5, -1, 2, 6, 1 << 40, -(1 << 62), 4])
    inside = (ids >= 0) & (ids < 5)
    table = torch.randn(5, 24).to(dtype)
    for name, place in places(table, device).items():
        with force_backend(backend):
            got = gather_rows(place, ids.to(device)).cpu()
        assert same(got[inside], table[ids[inside]]), name
        assert got[~inside].isnan().all(), name
        assert (got[~inside].contiguous().view(torch.uint8) == 255).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_distances(backend):
    """Rows of a wider table, every other id, an address that is no multiple of 16."""
    device = device_of(backend)
    wide = make_table(30, 80, torch.bfloat16)
    ids = torch.arange(40) % 30
    for part in (slice(0, 64), slice(8, 72), slice(1, 65)):
        with force_backend(backend):
            got = gather_rows(wide.to(device)[:, part], ids.to(device)[::2])
        assert same(got, wide[:, part][ids[::2]]), part


def test_what_is_refused():
    table, ids = torch.ones(3, 4), torch.tensor([1])
    for wrong in (torch.ones(3), torch.ones(0, 4), torch.ones(4, 3).T):
        with pytest.raises(ShapeError, match="needs table"):
            gather_rows(wrong, ids)
    with pytest.raises(ShapeError, match="int64"):
        gather_rows(table, ids.int())
    with pytest.raises(ShapeError, match="on the CPU"):
        gather_rows(table.to("meta"), ids)
    with pytest.raises(UserError):
        gather_rows(table.requires_grad_(), ids)


def test_shapes_without_values():
    """On the meta device, also with the table on the CPU."""
    ids = torch.empty((2, 3), dtype=torch.int64, device="meta")
    found = torch.ops.qlora_kit.gather_rows(torch.empty(5, 7, device="meta").half(), ids)
    assert (found.shape, found.dtype, found.device.type) == ((2, 3, 7), torch.float16, "meta")
    arguments = (torch.randn(5, 8), torch.tensor([[4, 0, 4]]))
    torch.library.opcheck(torch.ops.qlora_kit.gather_rows.default, arguments)


def test_who_waits(monkeypatch):
    """Rows of whole pieces, read by a kernel, do not."""
    like = torch.empty(0)
    assert not never_waits(torch.empty(4, 8), like)
    assert not cuda.serves(like)
    table = make_table(4, 8, torch.bfloat16)
    assert not cuda.is_readable(table)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    assert cuda.is_readable(table)
    assert not cuda.is_readable(table[:, 1:])
    assert not cuda.is_readable(table[:, :4])


@pytest.mark.gpu
def test_the_kernel_is_what_reads_locked_memory():
    """Without waiting; a plain table, and rows of odd lengths, go the other way, which waits."""
    assert "cuda" in BACKENDS
    table = make_table(100, 8192, torch.bfloat16)
    locked, ids = pinned_copy(table), torch.randint(0, 100, (4, 300), device="cuda")
    assert locked.is_pinned()
    assert never_waits(table, ids)
    assert not never_waits(table[:, :4], ids)
    gather_rows(locked, ids)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = gather_rows(locked, ids)
        with pytest.raises(RuntimeError, match="synchroniz"):
            gather_rows(table, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(got, table[ids.cpu()])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows(dtype):
    """More parts than warps that run at once, rows of 70B models, every row of the result."""
    table = make_table(2000, 8192, dtype)
    locked, ids = pinned_copy(table), torch.randint(0, 2000, (2, 10_001), device="cuda")
    got = gather_rows(locked, ids)
    beside = torch.nn.functional.embedding(ids, table.cuda())
    assert torch.equal(got.view(torch.uint8), beside.view(torch.uint8))


@pytest.mark.gpu
def test_recorded_in_a_graph():
    """Replayed on other ids, and on another table in the same memory."""
    table = make_table(64, 512, torch.float32)
    locked, ids = pinned_copy(table), torch.arange(64, device="cuda")
    gather_rows(locked, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gather_rows(locked, ids)
    for seed in range(3):
        new = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(seed))
        ids.copy_(new)
        captured.zero_()
        graph.replay()
        assert same(captured, table[new]), seed
    torch.cuda.synchronize()
    locked.copy_(table.flip(0))
    graph.replay()
    assert same(captured, table.flip(0)[new])
