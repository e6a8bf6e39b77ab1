"""Do we train like PEFT on a bitsandbytes NF4 base? Losses of real steps, side by side.

One real model, real sentences, one adapter start (ours, saved once and loaded by both), the
same batches and optimizer: the loss of every step has to agree within 1e-3. Speed is not
the question; the seconds are recorded because they come for free.

    python benchmarks/parity/peft_parity.py --model SmolLM2.gguf --data reviews.csv

The model is a `.gguf` file, a folder or a hub id; the data a .csv with a `text` column
(rows whose `source` is another than `--source` are left out) or a .jsonl file with the
field `text` or `prompt`. bitsandbytes stays in training mode: in evaluation mode it
repacks the weights for CPUs with AVX512-BF16 and rounds their scales to bfloat16.
"""

import argparse
import csv
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness.record import write_record  # noqa: E402
from qlora_kit.adapters.inject import attach  # noqa: E402
from qlora_kit.adapters.lora.config import LoRA, LoRAFA  # noqa: E402
from qlora_kit.checkpoint.source import open_source  # noqa: E402
from qlora_kit.load.model import load  # noqa: E402

TOLERANCE = 1e-3
METHODS: dict[str, LoRA] = {
    "lora": LoRA(rank=16, alpha=32),
    "rslora": LoRA(rank=16, alpha=32, rslora=True),
    "lora_fa": LoRAFA(rank=16, alpha=32),
}
Batch = dict[str, torch.Tensor]


def read_texts(path: Path, source: str) -> list[str]:
    """The sentences of a .csv or .jsonl file, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.field_size_limit(1 << 24)
            return [r["text"] for r in csv.DictReader(file) if r.get("source", source) == source]
        rows = [json.loads(line) for line in file]
        return [row.get("text") or row["prompt"] for row in rows]


def make_batches(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[Batch]:
    """`args.steps` batches of different sentences, padded on the right and masked."""
    stride = max(1, len(texts) // (args.steps * args.batch))
    chosen = texts[::stride][: args.steps * args.batch]
    batches = []
    for start in range(0, len(chosen), args.batch):
        rows = [tokenizer(t).input_ids[: args.length] for t in chosen[start : start + args.batch]]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def train(
    name: str, model: nn.Module, batches: list[Batch], learning_rate: float
) -> tuple[list[float], float]:
    """Losses and seconds of one pass over the batches with AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    device = next(model.parameters()).device
    losses = []
    began = time.perf_counter()
    for step, batch in enumerate(batches):
        loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"  {name}: step {step + 1}, loss {losses[-1]:.6f}", flush=True)
    return losses, time.perf_counter() - began


def train_ours(
    folder: Path, config: LoRA, start: Path, batches: list[Batch], args: argparse.Namespace
) -> tuple[list[float], float]:
    """Our side; also writes the adapter both sides start from."""
    model, _ = load(folder, dtype=args.dtype, device=args.device)
    attach(model.train(), config, seed=args.seed).save(start, base_model=str(folder))
    return train("ours", model, batches, args.learning_rate)


def train_peft(
    folder: Path, config: LoRA, start: Path, batches: list[Batch], args: argparse.Namespace
) -> tuple[list[float], float]:
    """PEFT's side, from the same start."""
    from peft import PeftModel

    dtype = getattr(torch, args.dtype)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantized, device_map={"": args.device}
    )
    model = PeftModel.from_pretrained(base, start, is_trainable=True).train()
    if config.freeze_a:
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    return train("peft", model, batches, args.learning_rate)


def compare(
    method: str, folder: Path, batches: list[Batch], args: argparse.Namespace
) -> dict[str, object]:
    """Train both and put the losses beside one another: one row of the record."""
    config = METHODS[method]
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "start"
        ours, seconds_ours = train_ours(folder, config, start, batches, args)
        gc.collect()
        theirs, seconds_peft = train_peft(folder, config, start, batches, args)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{method}: largest difference {worst:.2e} over {len(ours)} steps")
    return {
        "method": method,
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        "rank": config.rank,
        "alpha": config.alpha,
        "batch": args.batch,
        "seq": args.length,
        "steps": len(ours),
        "learning_rate": args.learning_rate,
        "dtype": args.dtype,
        "device": args.device,
        "seed": args.seed,
        "max_abs_difference": worst,
        "tolerance": TOLERANCE,
        "agrees": worst < TOLERANCE,
        "seconds_ours": round(seconds_ours, 1),
        "seconds_peft": round(seconds_peft, 1),
        "losses_ours": ours,
        "losses_peft": theirs,
    }


def main() -> int:
    """Run the comparison and write the record; 1 if a loss is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--data", required=True, help=".csv or .jsonl file with sentences")
    parser.add_argument("--source", default="rotten_tomatoes", help="value of the source column")
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=METHODS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=32, help="tokens per sentence, at most")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="instead of benchmarks/results")
    args = parser.parse_args()

    source = open_source(args.model)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    batches = make_batches(read_texts(Path(args.data), args.source), tokenizer, args)
    rows = [compare(method, source.folder, batches, args) for method in args.methods]
    print(write_record("parity", rows, folder=args.out))
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
