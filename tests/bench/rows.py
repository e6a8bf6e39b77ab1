"""Rows as a GPU would give them, for tables, verdicts and comparisons."""

from typing import Any

from qlora_kit.bench.methods import ALL
from qlora_kit.bench.record import Row


def row_of(method: str, **changes: Any) -> Row:
    """One measured row; whatever is not given is plausible for a 1B model."""
    m = ALL[method]
    full = m.impl == "full"
    stays = (
        {"trained": 4.6, "gradients": 4.6, "optimizer": 9.2}
        if full
        else {"weights": 0.5 if m.bits == 4 else 1.8, "embeddings": 0.5, "trained": 0.1}
    )
    parts = stays | {"step": 1.6 if full else 0.4}
    row: Row = {
        "impl": m.impl,
        "variant": m.variant,
        "model": "Llama-3.2-1B",
        "batch": 1,
        "seq": 2048,
        "method": m.method,
        "bits": m.bits,
        "masters": m.masters,
        "rank": 0 if full else 16,
        "policy": "recompute_all",
        "head": "chunked",
        "graphs": False,
        "optimizer": m.optimizer,
        "cap_gib": None,
        "oom": False,
        "tokens_per_s": 20_000.0 if full else 26_000.0,
        "mfu": 0.4 if full else 0.35,
        "gflops_per_token": 8.0 if full else 5.6,
        "components_gib": parts,
        "peak_allocated_gib": sum(parts.values()),
        "peak_reserved_gib": sum(parts.values()) * 1.1,
        "losses": [11.9, 11.8, 11.7, 11.6],
    }
    return row | changes


def record_of(*rows: Row, bench: str = "memory") -> dict[str, Any]:
    """A record of an H100."""
    return {
        "bench": bench,
        "commit": "abc1234",
        "dirty": False,
        "command": f"qlora-kit bench {bench}",
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpu_memory_bytes": 85_000_000_000,
        "driver": "580.1",
        "cpu": "x86_64, 16 cores",
        "env": {"torch": "2.11.0"},
        "peaks": {"bf16_tflops": 700.0},
        "rows": list(rows),
    }
