"""A run record with everything in it, made up, for tests and for looking at the report."""

import math
from dataclasses import asdict
from typing import Any

from qlora_kit.train.config import DataConfig, EvalConfig, ExportConfig, ModelConfig, RunConfig

PROMPTS = (
    "a fine, understated film with a quiet wit and a big heart .",
    "the plot is a soggy cardboard box left out in the rain .",
    "it's the kind of movie you can't quite recommend because it is all windup and no pitch .",
    "manages to be both hugely entertaining and uplifting .",
    "an unremittingly ugly movie to look at , listen to and think about .",
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="demo/smollm2-135m-instruct.gguf"),
        data=DataConfig(
            train="demo/rotten_tomatoes/train.jsonl",
            eval="demo/rotten_tomatoes/test.jsonl",
            limit_train=960,
            limit_eval=500,
        ),
        eval=EvalConfig(task="choice", choices=("positive", "negative")),
        export=ExportConfig(merge=True),
        output="runs/quickstart",
    )


def history(updates: int = 120) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for step in range(1, updates + 1):
        wiggle = math.sin(step * 12.9898) * 0.12 * math.exp(-step / 90)
        entry: dict[str, Any] = {
            "step": step,
            "epoch": step / updates,
            "loss": 0.35 + 2.6 * math.exp(-step / 9) + wiggle,
            "grad_norm": 0.4 + 3 * math.exp(-step / 7) + abs(wiggle) * 4,
            "learning_rate": 2e-4 * min(step / 6, (updates - step) / (updates - 6)),
            "tokens": step * 980,
            "tokens_per_s": 412.0 + 30 * math.sin(step),
            "memory_gib": 1.9,
        }
        entries.append(entry)
        if step % 30 == 0:
            entries.append({"step": step, "eval_loss": 0.38 + 2.3 * math.exp(-step / 11)})
    return entries


def measurement(name: str, loss: float, accuracy: float, answer: str) -> dict[str, Any]:
    answers = []
    for i, prompt in enumerate(PROMPTS):
        reference = "positive" if i in (0, 3) else "negative"
        said = reference if answer == "trained" and i != 2 else "positive"
        text = said if answer == "trained" else f"The sentiment of this movie review is {said}, as"
        asked = "Is the sentiment of this movie review positive or negative?\n\n" + prompt
        answers.append(
            {"prompt": asked, "reference": reference, "answer": text, "right": said == reference}
        )
    if answer == "base":
        answers[1]["answer"] = "```\n\nOutput:\n\n" * 12  # what an untrained model may write
        answers[2]["answer"] = '{"intent":"' + "HassTurnOn" * 12 + '"}'
    return {
        "name": name,
        "task": "choice",
        "rows": 500,
        "tokens": 1000,
        "loss": loss,
        "perplexity": math.exp(loss),
        "scores": {"accuracy": accuracy},
        "answers": answers,
        "seconds": 41.0,
    }


def data_report(source: str, examples: int, **changes: Any) -> dict[str, Any]:
    return {
        "source": source,
        "format": "prompt_completion",
        "template": "tokenizer",
        "max_length": 256,
        "rows": examples,
        "examples": examples,
        "packed_rows": examples,
        "tokens": examples * 68,
        "loss_tokens": examples * 2,
        "longest": 121,
        "truncated": 0,
        "tokens_lost": 0,
        "dropped": 0,
    } | changes


def record() -> dict[str, Any]:
    stages = [
        {"name": name, "seconds": seconds, "host_bytes": int(memory * 2**30)}
        for name, seconds, memory in (
            ("data", 0.9, 0.4),
            ("load", 5.2, 0.6),
            ("before", 61.0, 0.9),
            ("train", 251.0, 1.9),
            ("after", 48.0, 1.2),
            ("merge", 3.1, 1.3),
            ("check", 12.0, 1.8),
        )
    ]
    return {
        "format": 1,
        "finished": "2026-11-21T23:58:10+00:00",
        "config": asdict(config()),
        "environment": {
            "python": "3.11.2",
            "platform": "Linux-6.1-x86_64",
            "device": "cpu",
            "threads": 2,
            "cpu_count": 2,
            "host_memory_bytes": 24 * 2**30,
            "versions": {"qlora_kit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "commit": "1a2b3c4",
            "command": "qlora-kit train examples/quickstart.yaml",
        },
        "model": {
            "type": "llama",
            "class": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "trainable": 4_884_480,
            "adapted": 210,
            "base_bytes": 168_000_000,
            "dtype": "float32",
        },
        "data": {
            "train": data_report("demo/rotten_tomatoes/train.jsonl", 960),
            "eval": data_report("demo/rotten_tomatoes/test.jsonl", 500, truncated=3),
        },
        "training": {
            "updates": 120,
            "epochs": 1.0,
            "seconds": 251.0,
            "tokens": 117_600,
            "tokens_per_s": 413.0,
            "best_loss": 0.3812,
            "best_update": 120,
            "stopped_early": False,
            "history": history(),
        },
        "before": [measurement("eval", 3.4211, 0.624, "base")],
        "after": [measurement("eval", 0.1932, 0.828, "trained")],
        "merge": {
            "into": "quantized",
            "dtype": "bfloat16",
            "merged": 210,
            "nbytes": 269_000_000,
            "files": 1,
            "notes": [],
            "deviation": {
                "kl": 0.00021,
                "top1_agreement": 0.992,
                "loss_reference": 0.1932,
                "loss_other": 0.1938,
                "tokens": 128,
            },
            "deviation_text": "KL 0.00021, same top token 99.2%",
            "unchecked": None,
        },
        "stages": stages,
        "seconds": 381.4,
        "memory": {"host_peak_bytes": int(2.3 * 2**30)},
        "outputs": {
            "adapter": "runs/quickstart/adapter",
            "merged": "runs/quickstart/merged",
            "record": "runs/quickstart/run.json",
            "report": "runs/quickstart/report.html",
        },
    }
