"""The attention pair on the CPU: every rule against float64, and what must not matter."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.core.errors import BackendError, ShapeError
from qlora_kit.ops.attention import chunked, flash, pair
from qlora_kit.ops.attention.choose import BACKENDS, choose, force_attention, order
from qlora_kit.ops.attention.pair import attention_backward, attention_forward
from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents
from tests.ops.attention_cases import RESULTS, SHAPES, Truth, make_case, pack, run

LENGTHS = (3, 11, 9)
RULES = [(None, None), (7, None), (None, 5.0), (7, 5.0)]
DTYPES = [torch.float32, torch.bfloat16]


def backends(window=None, softcap=None):
    return ["chunked"] if window or softcap else ["cpu", "chunked"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [None, LENGTHS], ids=["rows", "documents"])
@pytest.mark.parametrize(("window", "softcap"), RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_match_float64(shape, window, softcap, documents, dtype):
    case = make_case(shape, dtype=dtype, documents=documents, window=window, softcap=softcap)
    truth = Truth(case)
    for name in backends(window, softcap):
        with force_attention(name):
            got = run(case)
        truth.check(got, name)
        assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in got.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bounds_bite(dtype):
    """Neighbouring rules, and documents that see their neighbours, are out of every bound."""

    def case(**changes):
        given = {"documents": LENGTHS, "window": 7, "softcap": 5.0} | changes
        return make_case((2, 37, 4, 2, 64), dtype=dtype, **given)

    truth = Truth(case())
    assert truth.worst(Truth(case()).values()) == 0
    wrong = {
        "one document": case(documents=None),
        "a token sees the document before": case(documents=(3, 12, 8)),
        "a token too many": case(window=8),
        "a token too few": case(window=6),
        "no softcap": case(softcap=None),
        "another scale": case(scale=0.13),
    }
    for what, other in wrong.items():
        assert truth.worst(Truth(other).values()) > 2, what


@pytest.mark.parametrize("documents", [None, LENGTHS], ids=["rows", "documents"])
@pytest.mark.parametrize(("window", "softcap"), RULES)
def test_chunks_do_not_matter(monkeypatch, window, softcap, documents):
    case = make_case((2, 150, 4, 2, 24), documents=documents, window=window, softcap=softcap)
    monkeypatch.setattr(chunked, "CHUNK_SCORES", 2 * 4 * 32 * 50)
    monkeypatch.setattr(chunked, "SMALLEST_CHUNK", 4)
    plan = chunked._Plan(case.q, case.k, case.rule, None)
    assert len(plan.chunks()) > 3
    with force_attention("chunked"):
        Truth(case).check(run(case), "small chunks")


class _Largest(TorchDispatchMode):
    """Remembers the most elements a result had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("reach", ["all", "window", "documents"])
def test_no_more_than_a_chunk_of_scores_exists(monkeypatch, reach):
    limit = 1 << 15
    monkeypatch.setattr(chunked, "CHUNK_SCORES", limit)
    case = make_case(
        (1, 900, 2, 2, 8),
        window=20 if reach == "window" else None,
        documents=(30,) if reach == "documents" else None,
    )
    case.documents = case.documents and replace(case.documents, longest=31)  # not rows of a batch
    with force_attention("chunked"), _Largest() as largest:
        run(case)
    assert largest.numel <= limit < 900 * 900 // 8
    if reach != "all":  # keys out of reach cost nothing: one chunk serves many queries
        assert len(chunked._Plan(case.q, case.k, case.rule, case.documents).chunks()) < 16


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_documents_are_as_if_alone(backend):
    case = make_case((2, 40, 4, 2, 16), documents=(9, 31))
    with force_attention(backend):
        packed = run(case)
        for row in range(2):
            for part in (slice(0, 9), slice(9, 40)):
                names = ("q", "k", "v", "dout")
                alone = {name: getattr(case, name)[row : row + 1, part] for name in names}
                got = run(replace(case, documents=None, **alone))
                for name in RESULTS:
                    torch.testing.assert_close(got[name], packed[name][row : row + 1, part])


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_one_document_changes_no_bit_of_another(backend, window):
    if backend == "cpu" and window:
        pytest.skip("no window")
    case = make_case((1, 60, 4, 2, 16), documents=(20, 13, 27), window=window)
    other = replace(case, **{n: getattr(case, n).clone() for n in ("q", "k", "v", "dout")})
    for tensor in (other.q, other.k, other.v, other.dout):
        tensor[:, 20:33] *= -3.0
    with force_attention(backend):
        before, after = run(case), run(other)
    for name in RESULTS:
        assert torch.equal(before[name][:, :20], after[name][:, :20]), name
        assert torch.equal(before[name][:, 33:], after[name][:, 33:]), name
        assert not torch.equal(before[name][:, 20:33], after[name][:, 20:33]), name


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_the_future_changes_no_bit(backend):
    case = make_case((1, 50, 4, 2, 16))
    other = replace(case, k=case.k.clone(), v=case.v.clone())
    other.k[:, 30:] += 1
    other.v[:, 30:] += 1
    with force_attention(backend):
        before, after = run(case)["out"], run(other)["out"]
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_repeat(backend, dtype):
    case = make_case((2, 70, 8, 2, 64), dtype=dtype, documents=LENGTHS, deterministic=True)
    with force_attention(backend):
        first, second = run(case), run(case)
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


@pytest.mark.parametrize(("one", "two"), [("cpu", "chunked"), ("chunked", "cpu")])
@pytest.mark.parametrize("documents", [None, LENGTHS], ids=["rows", "documents"])
def test_the_halves_may_run_on_different_backends(one, two, documents):
    case = make_case((2, 37, 4, 2, 16), documents=documents)
    with force_attention(one):
        out, saved = attention_forward(case.q, case.k, case.v, case.rule, case.documents)
    with force_attention(two):
        gradients = attention_backward(
            case.dout, case.q, case.k, case.v, out, saved, case.rule, case.documents
        )
    Truth(case).check(dict(zip(RESULTS, (out, *gradients), strict=True)), f"{one}, {two}")
    assert [tuple(t.shape) for t in saved] == [(2 * 37 * 4,)]


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_a_single_token_sees_itself(backend):
    case = make_case((3, 1, 4, 2, 8))
    with force_attention(backend):
        got = run(case)
    Truth(case).check(got, backend)
    assert torch.equal(got["out"], case.v.repeat_interleave(2, 2))
    assert Call.of(case.q, case.rule, documents=False).single


def test_float64_is_served():
    case = make_case((1, 9, 2, 1, 8), dtype=torch.float64, window=3)
    out = run(case)["out"]
    assert out.dtype == torch.float64
    assert (out - Truth(case).values()["out"]).abs().max() < 1e-14


@pytest.mark.parametrize("shape", [(0, 5, 2, 1, 8), (2, 0, 2, 1, 8)])
def test_no_tokens(shape):
    assert all(tensor.numel() == 0 for tensor in run(make_case(shape)).values())


def test_documents_are_read_off_positions():
    documents = pack(2, 37, LENGTHS)
    assert documents.starts.tolist()[:6] == [0, 3, 14, 23, 26, 37]
    assert documents.starts.tolist()[-1] == 74
    assert documents.starts.dtype == torch.int32
    assert documents.longest == 11
    continued = Documents.from_positions(torch.tensor([[5, 6, 7], [0, 1, 2]]))  # a row starts one
    assert continued.starts.tolist() == [0, 3, 6]
    for bad in (torch.arange(4), torch.zeros(1, 0), torch.zeros(1, 3, device="meta")):
        with pytest.raises(ShapeError, match="on the CPU"):
            Documents.from_positions(bad)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_documents_without_tokens_may_follow(backend):
    """So that the starts of every batch can have one shape."""
    case = make_case((1, 37, 4, 2, 16), documents=LENGTHS)
    end = case.documents.starts[-1:]
    padded = replace(case, documents=Documents(torch.cat([case.documents.starts, *[end] * 3]), 11))
    with force_attention(backend):
        before, after = run(case), run(padded)
    assert all(torch.equal(before[name], after[name]) for name in RESULTS)


@pytest.fixture
def calls(monkeypatch):
    """What `choose` was asked."""
    seen = []

    def spy(call):
        seen.append(call)
        return choose(call)

    monkeypatch.setattr(pair, "choose", spy)
    return seen


def test_what_a_gpu_cannot_read_16_bytes_at_a_time_is_copied():
    case = make_case((2, 9, 4, 2, 8), dtype=torch.bfloat16)
    kept = pair._aligned("flash", case.q, case.k, case.v)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (case.q, case.k, case.v)]
    shifted = torch.zeros(2 * 9 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 9, 2, 8)
    narrow = torch.zeros(2, 9, 20, dtype=torch.bfloat16)[..., :16].view(2, 9, 2, 8)
    for odd in (shifted, narrow):
        (copied,) = pair._aligned("cudnn", odd)
        assert copied.data_ptr() != odd.data_ptr()
        assert copied.is_contiguous()
        assert pair._aligned("chunked", odd)[0] is odd
    assert pair._is_aligned(torch.zeros(1, 9, 2, 8)[:, :, :1])  # a head's step is never taken


def test_documents_of_one_length_are_rows(calls):
    case = make_case((2, 40, 4, 2, 16), documents=(20,))
    Truth(case).check(run(case), "documents of 20")
    uneven = make_case((2, 40, 4, 2, 16), documents=(19,))
    run(uneven)
    assert [call.documents for call in calls] == [False, False, True, True]


def test_a_window_that_hides_nothing_is_none(calls):
    for window in (39, 40):
        run(make_case((1, 40, 4, 2, 16), window=window))
    run(make_case((1, 40, 4, 2, 16), window=11, documents=LENGTHS))
    assert [call.window for call in calls] == [True, True, False, False, False, False]


def test_the_choice():
    q = torch.zeros(1, 4, 2, 8)
    plain = Call.of(q, AttentionRule(scale=1.0), documents=False)
    assert choose(plain) == "cpu"
    assert choose(replace(plain, documents=True, deterministic=True)) == "cpu"
    assert choose(replace(plain, window=True)) == "chunked"
    assert choose(replace(plain, softcap=True)) == "chunked"
    assert choose(replace(plain, device=torch.device("meta"))) == "outline"
    assert set(order(torch.device("cpu"))) < set(BACKENDS)


def test_a_forced_backend_that_cannot_serve_raises(monkeypatch):
    case = make_case((1, 9, 2, 1, 8), window=3)
    with force_attention("cpu"), pytest.raises(BackendError, match=r"no window.*chunked"):
        run(case)
    with force_attention("cudnn"), pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        run(case)
    with force_attention("flash"), pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        run(case)
    with pytest.raises(BackendError, match="no attention backend is called 'xformers'"):
        force_attention("xformers").__enter__()
    monkeypatch.setenv("QLORA_KIT_ATTENTION", "flash")
    with pytest.raises(BackendError, match="QLORA_KIT_ATTENTION"):
        run(case)
    with force_attention("chunked"):  # the nearer choice wins
        run(case)


def test_misfits_are_refused():
    case = make_case((1, 9, 4, 2, 8))
    q, k, v, rule = case.q, case.k, case.v, case.rule
    with pytest.raises(ShapeError, match="divisor of Hq"):
        attention_forward(q[:, :, :3], k, v, rule)
    with pytest.raises(ShapeError, match=r"q \(B, T, Hq, D\)"):
        attention_forward(q, k[:, :8], v[:, :8], rule)
    with pytest.raises(ShapeError, match="one float dtype"):
        attention_forward(q, k.double(), v, rule)
    with pytest.raises(ShapeError, match="contiguous last"):
        attention_forward(q, k, v.mT.contiguous().mT, rule)
    with pytest.raises(ShapeError, match="int32 on cpu"):
        attention_forward(q, k, v, rule, Documents(torch.tensor([0, 9]), 9))
    out, saved = attention_forward(q, k, v, rule)
    with pytest.raises(ShapeError, match="dout and out"):
        attention_backward(out[:, :8], q, k, v, out, saved, rule)
    with pytest.raises(ShapeError, match="window"):
        AttentionRule(scale=1.0, window=0)
    with pytest.raises(ShapeError, match="softcap"):
        AttentionRule(scale=1.0, softcap=0.0)


@pytest.fixture
def package(monkeypatch):
    """A FlashAttention 3 that seems to be installed, and what torch was told."""
    told = []
    flash.activate_installed.cache_clear()
    monkeypatch.setattr(flash, "find_spec", lambda name: name == "flash_attn_interface")
    attention = torch.nn.attention
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3"], raising=False)
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: None, raising=False)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", told.append, raising=False)
    yield told
    flash.activate_installed.cache_clear()


def test_an_installed_package_is_used_once(package):
    assert [flash.activate_installed(major) for major in (8, 9, 9, 12)] == [
        None,
        "FA3",
        "FA3",
        None,
    ]
    assert package == ["FA3"]


def test_what_a_user_activated_stays(package, monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
    assert flash.activate_installed(9) is None
    assert package == []


def test_a_broken_package_is_said_and_not_used(package, monkeypatch, caplog):
    def fail(name):
        raise ImportError("libcudart.so.11 not found")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail)
    with caplog.at_level("INFO", logger="qlora_kit"):
        assert flash.activate_installed(9) is None
    assert "libcudart.so.11" in caplog.text
