"""What all benchmarks share: FLOPs, profile, steps, processes."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from qlora_kit.bench.flops import linear_shapes, mfu, step_flops
from qlora_kit.bench.process import run_process
from qlora_kit.bench.profile import (
    CATEGORIES,
    KernelRun,
    break_down,
    busy_us,
    category_of,
    classify,
    kernel_runs,
)
from qlora_kit.bench.shapes import SHAPES
from qlora_kit.bench.steps import CHECK_POSITIONS, StepClock, is_out_of_memory, make_batches
from qlora_kit.bench.subject import Build, Job, Point, Stage
from tests import tiny_models

# FLOPs


def test_flops_of_8b_are_those_of_the_design():
    """4 x 7.5 G per token for linears and head; causal attention at 2,048 three times 0.54 G."""
    flops = step_flops(SHAPES["Llama-3.1-8B"], 2048, 16, "lora")
    assert flops.linears == 4 * 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert flops.linears + flops.head == pytest.approx(4 * 7.5e9, rel=0.001)
    assert flops.attention == pytest.approx(3 * 0.537e9, rel=0.001)
    assert flops.adapter / flops.total < 0.01
    assert step_flops(SHAPES["Llama-3.1-8B"], 2048, 0, "lora").adapter == 0


def test_flops_are_those_a_counter_sees():
    """Linears, head and adapter of a dense tiny model, forward and backward, exactly."""
    model = tiny_models.build("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rank, seq = 4, 16
    shapes = linear_shapes(model.config)
    ids = tiny_models.tokens(1, seq)
    with FlopCounterMode(display=False) as counter:
        hidden = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=hidden, use_cache=False).logits.sum().backward()
        for n, k in shapes * model.config.num_hidden_layers:
            a, b = (torch.randn(*s, requires_grad=True) for s in ((rank, k), (n, rank)))
            x = torch.randn(seq, k, requires_grad=True)
            (x @ a.T @ b.T).sum().backward()
    counted = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(op)
    )
    # bmm is the rotary table and eager attention, which have a line of their own
    batched = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    flops = step_flops(model.config, seq, rank, "lora")
    expected = seq * (flops.linears + flops.head + flops.adapter)
    assert counted - batched == expected
    recomputed = seq * (1.5 * flops.linears + flops.head + flops.adapter)
    assert counted - batched != recomputed


def test_lora_fa_has_no_gradient_of_a():
    config = SHAPES["Llama-3.1-8B"]
    both = [step_flops(config, 2048, 16, method).adapter for method in ("lora", "lora_fa")]
    inputs = sum(k for _, k in linear_shapes(config))
    assert both[0] - both[1] == 32 * 2 * 16 * inputs


def test_mfu_is_a_share():
    assert mfu(10_000, 32e9, 700) == pytest.approx(0.457, abs=0.001)


# Profile

NAMES = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "gemm",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "gemm",
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int>": "gemm",
    "nf4_fused_bfloat16_128": "gemm",
    "nf4_portable_add_bfloat16": "gemm",
    "nf4_dequantize_bfloat16": "dequantize",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>": "dequantize",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
    "void at::native::vectorized_elementwise_kernel<8, ...>": "elementwise",
    "triton_poi_fused__scaled_dot_product_flash_attention_backward_mul_3": "elementwise",
    "rms_norm_bfloat16_backward_wide": "elementwise",
    "gated_activation_bfloat16_silu_pieces": "elementwise",
    "rotary_bfloat16_half": "elementwise",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<...>": "loss",
    "liger_cross_entropy_kernel": "loss",
    "triton_red_fused__log_softmax_7": "loss",
    "low_rank_bfloat16_transposed": "lora",
    "void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 1, 256, 1>": "optimizer",
    "void at::native::multi_tensor_apply_kernel<LpNormFunctor...>": "optimizer",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memset (Device)": "copies",
    "void at::native::bfloat16_copy_kernel_cuda": "copies",
    "void cub::DeviceRadixSortOnesweepKernel<...>": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_classified_by_name(name):
    assert classify(name) == NAMES[name]
    assert classify(name) in CATEGORIES


def run_of(name="nvjet_64x8", start=0.0, end=1.0, op="", shapes=()):
    return KernelRun(name=name, start_us=start, end_us=end, op=op, shapes=shapes)


@pytest.mark.parametrize(
    ("op", "shapes", "wanted"),
    [
        ("aten::mm", ((8192, 4096), (4096, 16)), "lora"),
        ("aten::addmm", ((8192, 64), (8192, 4096), (4096, 64)), "lora"),
        ("aten::mm", ((8192, 4096), (4096, 4096)), "gemm"),
        ("aten::mm", ((8192, 4112), (4112, 4096)), "gemm"),  # LoRA as more of the contraction
        ("", (), "gemm"),
        ("aten::gelu", ((8192, 16),), "gemm"),  # not a product: the shape says nothing
    ],
)
def test_skinny_products_are_loras(op, shapes, wanted):
    assert category_of(run_of(op=op, shapes=shapes), rank=16, vocab_size=128256) == wanted


def test_what_runs_over_the_vocabulary_is_the_loss():
    name = "void at::native::vectorized_elementwise_kernel<8, exp>"
    over = run_of(name, op="aten::exp", shapes=((512, 128256),))
    assert category_of(over, rank=16, vocab_size=128256) == "loss"
    assert category_of(over, rank=16, vocab_size=32000) == "elementwise"
    head = run_of("nvjet_head", op="aten::mm", shapes=((512, 4096), (4096, 128256)))
    assert category_of(head, rank=16, vocab_size=128256) == "gemm"


def test_breakdown_adds_up():
    """Two steps of 10 us: a product, a copy beside it on another stream, then nothing."""
    runs = [
        run_of("nvjet_a", 0, 6),
        run_of("Memcpy DtoH", 4, 8),
        run_of("nvjet_a", 10, 16),
        run_of("nf4_dequantize_bfloat16", 16, 18),
    ]
    found = break_down(runs, steps=2, step_ms=0.010, rank=16, vocab_size=99)
    assert busy_us(runs) == 16
    assert found.busy_ms == pytest.approx(0.008)
    assert found.category_ms["gemm"] == pytest.approx(0.006)
    assert found.category_ms["copies"] == pytest.approx(0.002)
    assert found.category_ms["dequantize"] == pytest.approx(0.001)
    assert found.category_ms["gaps"] == pytest.approx(0.002)
    assert sum(found.category_ms.values()) - found.category_ms["gaps"] > found.busy_ms  # overlap
    assert found.kernels[0]["name"] == "nvjet_a"
    assert found.kernels[0]["calls"] == 1


def event(name, kind, start=0.0, end=0.0, kernels=(), shapes=(), annotation=False):
    return SimpleNamespace(
        name=name,
        device_type=kind,
        time_range=SimpleNamespace(start=start, end=end),
        kernels=[SimpleNamespace(name=k, duration=d) for k, d in kernels],
        input_shapes=list(shapes),
        is_user_annotation=annotation,
    )


def test_kernels_find_the_operation_that_launched_them():
    """By name and duration: two runs of one kernel go to their own operations."""
    small, large = [[8, 64], [64, 4]], [[8, 64], [64, 64]]
    events = [
        event("aten::mm", DeviceType.CPU, kernels=[("nvjet", 1.0)], shapes=small),
        event("aten::mm", DeviceType.CPU, kernels=[("nvjet", 3.0)], shapes=[*large, []]),
        event("a step", DeviceType.CUDA, 0, 20, annotation=True),
        event("nvjet", DeviceType.CUDA, 5.0, 8.0),
        event("nvjet", DeviceType.CUDA, 1.0, 2.0),
        event("triton_poi_0", DeviceType.CUDA, 8.0, 9.0),
    ]
    runs = kernel_runs(events)
    assert [(r.name, r.op) for r in runs] == [
        ("nvjet", "aten::mm"),
        ("nvjet", "aten::mm"),
        ("triton_poi_0", ""),
    ]
    assert [category_of(r, rank=1, vocab_size=9) for r in runs] == ["gemm", "lora", "elementwise"]


# Steps


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_in_anyones_words(error, wanted):
    assert is_out_of_memory(error) is wanted


def test_batches_are_the_same_everywhere_and_the_first_has_few_labels():
    first, again = (make_batches(512, 2, 64, 7, "cpu") for _ in range(2))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])
    check, *rest = first
    labelled = check["labels"] != -100
    assert labelled.sum() == CHECK_POSITIONS
    assert not labelled[:, 0].any()  # nothing predicts the first token
    assert torch.equal(check["labels"][labelled], check["input_ids"][labelled])
    for batch in rest:
        assert torch.equal(batch["labels"], batch["input_ids"])
    assert not torch.equal(rest[0]["input_ids"], rest[1]["input_ids"])


def test_a_step_lies_between_two_marks():
    clock = StepClock("cpu")
    for _ in range(4):
        clock.mark()
    assert len(clock.step_ms()) == 3
    assert min(clock.step_ms()) >= 0


# Processes


def test_jobs_travel_as_json():
    build = Build(impl="unsloth", variant="compile+tiled", model="tiny", checkpoint="x")
    point = Point(batch=1, seq=2, policy="save", cap_gib=44.0, cases=("full", "best"))
    job = Job(build=build, points=(point,), profile=True, rows_file="rows")
    assert Job.from_json(job.to_json()) == job
    assert build.switches == {"compile", "tiled"}
    assert build.torch_dtype is torch.bfloat16
    assert json.loads(job.to_json())["steps"] == 6


def test_a_process_that_fails_says_why(tmp_path):
    code = "import sys; print('working'); sys.exit('the reason')"
    outcome = run_process([sys.executable, "-c", code], limit_seconds=30, folder=tmp_path)
    assert outcome.code == 1
    assert not outcome.timed_out
    assert outcome.reason == "the reason"


def test_a_process_is_ended_at_its_limit(capsys, tmp_path):
    code = "import time; print('· here'); time.sleep(60)"
    outcome = run_process([sys.executable, "-c", code], limit_seconds=2, folder=tmp_path)
    assert outcome.timed_out
    assert outcome.seconds < 20
    assert "stopped after" in outcome.reason
    assert "here" in capsys.readouterr().out  # stages are shown as they come


def test_a_killed_process_is_named(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    outcome = run_process([sys.executable, "-c", code], limit_seconds=30, folder=tmp_path)
    assert "SIGKILL" in outcome.reason


def test_a_process_finds_this_repository_and_its_environment(tmp_path):
    code = "import benchmarks.train.cases, os; print(os.environ['X'], os.getcwd())"
    outcome = run_process(
        [sys.executable, "-c", code],
        limit_seconds=60,
        environment={"X": "set"},
        folder=tmp_path,
    )
    assert outcome.reason == ""
    assert outcome.tail[-1] == f"set {tmp_path}"


def test_stages_count_from_the_start_of_the_process(capsys):
    stage = Stage()
    assert stage("one", "note") > 0
    assert capsys.readouterr().out.startswith("·")
    assert list(stage.seconds) == ["one"]
