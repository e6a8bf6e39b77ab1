"""From options to jobs."""

from dataclasses import replace

import pytest

from qlora_kit.bench.child import BUILDERS, first_fields
from qlora_kit.bench.grid import Options, jobs_of, merged
from qlora_kit.bench.methods import ALL, METHODS, PEERS, method_of
from qlora_kit.core.errors import ConfigError

ALL_METHODS = Options(models=("Llama-3.2-1B",), methods=tuple(ALL), fresh=False)


def test_every_method_has_its_rows_and_knows_them_again():
    names = {
        method_of(first_fields(job.build, point))
        for job in jobs_of(ALL_METHODS)
        for point in job.points
    }
    assert names == set(ALL)
    assert {job.build.impl for job in jobs_of(ALL_METHODS)} <= set(BUILDERS)


def test_an_optimizer_of_ones_own_does_not_change_the_method():
    options = replace(ALL_METHODS, methods=("full", "qlora"), optimizer="adamw_torch")
    rows = [first_fields(job.build, job.points[0]) for job in jobs_of(options)]
    assert [method_of(row) for row in rows] == ["full", "qlora"]
    assert [row["optimizer"] for row in rows] == ["adamw_torch_fused", "adamw_torch"]


def test_full_is_measured_with_both_heads_and_both_policies():
    (job,) = jobs_of(replace(ALL_METHODS, methods=("full",), policies=("offload",)))
    assert {(p.policy, p.head) for p in job.points} == {
        (policy, head) for policy in ("save", "recompute_all") for head in ("chunked", "stock")
    }
    assert (job.build.bits, job.build.masters, job.build.rank) == (16, "float32", 0)


@pytest.mark.parametrize(
    ("graphs", "device", "wanted"),
    [
        ("off", "cuda", {(1, False), (4, False), (16, False)}),
        ("on", "cuda", {(1, True), (4, True), (16, False)}),  # 32,768 tokens are never recorded
        ("both", "cuda", {(1, False), (1, True), (4, False), (4, True), (16, False)}),
        ("both", "cpu", {(1, False), (4, False), (16, False)}),
    ],
)
def test_graphs_are_for_small_batches(graphs, device, wanted):
    options = replace(
        ALL_METHODS,
        methods=("qlora",),
        batches=(1, 4, 16),
        policies=("save",),
        graphs=graphs,
        device=device,
    )
    (job,) = jobs_of(options)
    assert {(p.batch, p.graph) for p in job.points} == wanted


def test_fresh_means_a_process_for_every_point():
    shared = jobs_of(ALL_METHODS)
    fresh = jobs_of(replace(ALL_METHODS, fresh=True))
    assert all(len(job.points) == 1 for job in fresh)
    assert len(fresh) == sum(len(job.points) for job in shared)


def test_peers_are_built_for_their_policy():
    for name in PEERS:
        jobs = jobs_of(replace(ALL_METHODS, methods=(name,), batches=(1, 2)))
        for job in jobs:
            assert job.build.checkpointing is (job.points[0].policy != "save")
        unsloth = ALL[name].impl == "unsloth"
        assert all(len({p.batch for p in job.points}) == (1 if unsloth else 2) for job in jobs)


def test_rounds_share_processes_and_points():
    first = replace(ALL_METHODS, methods=("full", "qlora"))
    second = replace(ALL_METHODS, methods=("qlora",), policies=("save", "offload"))
    jobs = merged([first, second])
    assert len(jobs) == 2
    assert [p.policy for p in jobs[1].points] == ["recompute_all", "save", "offload"]


def test_models_are_measured_one_after_the_other():
    two = replace(ALL_METHODS, models=("Llama-3.2-1B", "Llama-3.2-3B"), methods=tuple(METHODS))
    models = [job.build.model for job in merged([two, replace(two, methods=("lora",))])]
    assert models == sorted(models)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("qlorra",)}, "unknown method 'qlorra'"),
        ({"graphs": "maybe"}, "unknown graphs"),
        ({"batches": (0,)}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"policies": ("save", "saves")}, "unknown policy 'saves'"),
        ({"policies": ("save:8,recompute:24",)}, "unknown policy 'recompute'"),
        ({"optimizer": "adam_8bit"}, "adamw_8bit"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(ALL_METHODS, **changes)


def test_mixtures_and_transformers_optimizers_are_known():
    mixed = ("save:8,recompute_all:24", "offload")
    assert replace(ALL_METHODS, policies=mixed, optimizer="paged_adamw_32bit").policies == mixed
