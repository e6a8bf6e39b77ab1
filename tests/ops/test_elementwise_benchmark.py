"""The benchmark of the elementwise ops at sizes a CPU can take: it checks, measures, records."""

import json
import sys

import pytest
import torch

from benchmarks.ops import elementwise as benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")
def test_it_measures_and_records(monkeypatch, tmp_path, capsys):
    arguments = ["elementwise", "--seconds", "0.01", "--without-compiled", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(benchmark, "HOST_CALLS", 2)
    benchmark.main()
    (file,) = tmp_path.rglob("*.json")
    rows = json.loads(file.read_text())["rows"]
    ops = {row["op"] for row in rows}
    assert {"rms_norm", "rms_norm_backward", "rotary_"} < ops
    assert {row["impl"] for row in rows} == {"ours", "copy"}
    assert all(row["us"] > 0 for row in rows)
    assert benchmark.summary(rows) in capsys.readouterr().out


def test_ours_is_compared_with_what_was_compiled():
    ours = {"op": "rotary_", "shape": "16x4x16", "impl": "ours", "us": 2.0, "of_copy": 0.93}
    compiled = ours | {"impl": "compiled", "us": 3.0, "host_us": 31.2}
    other = compiled | {"shape": "8x4x16", "us": 9.0}
    (line,) = benchmark.summary([other, ours | {"host_us": 12.1}, compiled]).splitlines()
    wanted = "93.0% of a copy, 1.50x as fast as compiled; host: ours 12 us, compiled 31 us"
    assert line.startswith("rotary_ ")
    assert line.endswith(f" 2.0 us  {wanted}")


def test_bytes_are_counted():
    forward, added, backward = benchmark.norm_cases((8, 64))
    assert (forward.moved, added.moved, backward.moved) == (2048, 3072, 5120)
    assert benchmark.rotary_case((8, 4, 16)).moved == 2048
    assert [case.moved for case in benchmark.gated_cases(8, 32)] == [1536, 3072]


def test_a_wrong_answer_is_not_timed():
    case = benchmark.norm_cases((8, 64))[0]
    with torch.no_grad():
        benchmark.check(case, None)
        with pytest.raises(AssertionError, match=r"rms_norm .* off by"):
            benchmark.check(case, lambda x, out, weight: 1.05 * case.theirs(x, out, weight))
