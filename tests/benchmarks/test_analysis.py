"""The record and the figure of the analyses, from an inspection of tiny adapters."""

import json
from pathlib import Path

from benchmarks.analysis.__main__ import main
from qlora_kit.adapters.formats.peft import AdapterFiles, write_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.analysis.record import Options, inspect_adapters
from tests.analysis.helpers import random_pair


def write(folder: Path, rank: int, seed: int) -> Path:
    pairs: dict[str, LowRank] = {
        f"model.layers.{n}.self_attn.q_proj": random_pair(32, 32, rank, seed + n) for n in (0, 1)
    }
    write_adapter(
        folder / "adapter", AdapterFiles(config=LoRA(rank=rank, alpha=rank), deltas=pairs)
    )
    return folder / "adapter"


def test_record_and_figure(tmp_path):
    folders = [write(tmp_path / f"r{r}-s{s}", r, s) for r, s in ((2, 0), (20, 0), (20, 5))]
    inspected = inspect_adapters(folders, Options())
    (tmp_path / "inspect.json").write_text(json.dumps(inspected))
    sweep = {
        "bench": "sweep of ranks",
        "config": {
            "model": {"path": "m", "bits": 4},
            "data": {"limit_train": 8, "limit_eval": 4},
            "adapter": {"alpha": 8, "rank": 4},
        },
        "rows": [{"group": ["q_proj"], "rank": 1, "loss": 0.5}],
    }
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    figure = tmp_path / "figure.svg"
    main([*[str(tmp_path)] * 2, "--out", str(tmp_path / "results"), "--figure", str(figure)])
    (file,) = (tmp_path / "results" / "analysis").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == ["adapter"] * 3 + ["pair"] * 3 + ["sweep of ranks"]
    assert [len(row["means"]) for row in rows[3:6]] == [2, 2, 0]  # 20 x 20 is left out
    assert rows[3]["names"] == ["r2-s0", "r20-s0"]
    assert [len(row["layers"]) for row in rows[3:6]] == [0, 0, 4]  # φ(8, 8) needs rank 8
    assert [len(module["values"]) for module in rows[1]["modules"]] == [8, 8]
    assert rows[6]["scale"] == 2
    text = figure.read_text()
    assert text.startswith("<svg")
    assert all(f"{side}, {what}" in text for side in "AB" for what in ("same seed", "random"))
    assert str(tmp_path) not in file.read_text()
