"""The benchmark of nf4_linear at sizes a CPU can take: it runs, judges, records and draws."""

import json

import pytest
import torch

from benchmarks.ops import nf4_linear as benchmark
from benchmarks.ops.nf4_linear_targets import geometric_mean, judge, strategy_table, summary, target

pytest.importorskip("bitsandbytes")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")


def row(impl, ms, m=16, which="forward", shape=(64, 64), strategy=None):
    n, k = shape
    return {"n": n, "k": k, "m": m, "pass": which, "impl": impl, "ms_median": ms,
            "strategy": strategy}  # fmt: skip


def point(ours, peft=2.0, m=16, which="forward", shape=(64, 64)):
    times = {"ours": ours, "dense": 1.0, "peft": peft}
    return [row(impl, ms, m, which, shape, impl[:1]) for impl, ms in times.items()]


def test_targets_are_the_table():
    assert target("forward", 1) == target("forward", 4) == (0.40, 0.60)
    assert target("backward_dx", 5) == (0.60, 0.80)
    assert target("forward", 8192) == (1.02, 1.07)
    assert target("forward", 8193) is None
    assert target("backward", 1) is None


def test_a_point_is_judged():
    assert judge(point(0.5)) == "[o] 0.50 pass"
    assert judge(point(0.51)) == "[o] 0.50 miss"
    assert judge(point(0.81, peft=0.81)) == "[o] 0.50 FLOOR SLOWER THAN PEFT"
    assert judge(point(9.0, peft=9.5, which="backward")) == "[o]"


def test_a_record_is_summed_up():
    assert geometric_mean([0.5, 2.0]) == 1.0
    rows = point(0.4, m=1) + point(0.9, m=16) + point(3.0, which="backward", shape=(64, 128))
    text = summary(rows).splitlines()
    assert text[0] == (
        "forward: geometric mean 0.600 of dense, 1 pass, 0 miss, 1 FLOOR; "
        "not faster than peft: nowhere"
    )
    assert text[1].endswith("not faster than peft: 64x128 M 16")
    assert text[2] == "all: geometric mean 0.600 of dense, target 0.85 pass"


def test_strategies_are_compared():
    rows = [row("dense", 2.0), row("ours", 1.0, strategy="dense"), row("ours", 0.5, strategy="f")]
    assert strategy_table(rows) == ("forward     M    16  dense  0.50  f  0.25  | fastest: 64x64 f")


@CPU_ONLY
def test_it_measures_and_records(tmp_path, capsys):
    arguments = ["--shapes", "64x128", "--m", "1", "20", "--seconds", "0.5", "--out"]
    assert benchmark.main([*arguments, str(tmp_path)]) == 0
    (file,) = tmp_path.glob("nf4_linear/*.json")
    record = json.loads(file.read_text())
    assert {entry["pass"] for entry in record["rows"]} == set(benchmark.PASSES)
    assert {entry["impl"] for entry in record["rows"]} == {"ours", "dense", "bitsandbytes", "peft"}
    assert all(entry["ms_p10"] <= entry["ms_median"] <= entry["ms_p90"] for entry in record["rows"])
    assert "all: geometric mean" in capsys.readouterr().out


@CPU_ONLY
def test_a_wrong_result_is_not_timed_in_silence(monkeypatch, capsys):
    """Nor does a part of the grid become a claim."""

    def wrong(self, i):
        return self.x @ self.dense[i].T

    monkeypatch.setattr(benchmark.Case, "our_forward", wrong)
    arguments = ["--shapes", "64x128", "--m", "20", "--passes", "forward", "--seconds", "0.1"]
    assert benchmark.main(arguments) == 1
    out = capsys.readouterr().out
    assert "ours forward of (20, 64); run tests/ops" in out
    assert "not recorded" in out


def test_only_the_whole_grid_is_a_claim():
    whole = list(benchmark.points(benchmark.parse([])))
    assert len(whole) == 5 * 14 * 3
    assert benchmark.is_whole(whole)
    assert benchmark.is_whole(list(benchmark.points(benchmark.parse(["--strategies"]))))
    assert not benchmark.is_whole(whole[1:])
    assert not benchmark.is_whole(list(benchmark.points(benchmark.parse(["--quick"]))))


def test_calls_fill_a_replay():
    assert benchmark.calls_of(15, 0.003) == 60  # 0.18 ms: four times is the most
    assert benchmark.calls_of(2, 0.1) == 4
    assert benchmark.calls_of(2, 5.0) == 2


def test_it_draws(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.ops import plot_nf4_linear

    rows = [entry for m in (1, 16, 2048) for which in ("forward", "backward_dx")
            for entry in point(0.5, m=m, which=which)]  # fmt: skip
    record = {"gpu": "none", "commit": "0", "rows": rows}
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        plot_nf4_linear.draw(record, file)
    assert files[0].read_bytes() == files[1].read_bytes()
