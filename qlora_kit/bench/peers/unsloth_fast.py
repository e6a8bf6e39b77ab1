"""Unsloth, through its documented functions, in the variants it may be fastest in.

Switches of a variant: `compile` (UNSLOTH_BLOCK_COMPILE=1, else 0), `tiled` (its tiled MLP,
for long rows), `plain` (no autocast around the forward; its own trainer runs one).
Unsloth patches transformers when it is imported, so it comes first and the process is its
own. Its source is under the AGPL: measured, never read.
"""

import contextlib
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.bench.subject import (
    Batch,
    Build,
    NotPossible,
    Stage,
    Subject,
    make_optimizer,
)

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def environment(build: Build) -> dict[str, str]:
    """Variables that have to be set before the process starts."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_DISABLE_AUTO_UPDATES": "1",
        "UNSLOTH_GC_PREFETCH": "1",
        "UNSLOTH_BLOCK_COMPILE": "1" if "compile" in build.switches else "0",
    }


def _options(build: Build, *functions: Any) -> list[dict[str, Any]]:
    """The tiled MLP goes to whichever public function takes it."""
    found: list[dict[str, Any]] = [{} for _ in functions]
    if "tiled" not in build.switches:
        return found
    for options, function in zip(found, functions, strict=True):
        if "unsloth_tiled_mlp" in inspect.signature(function).parameters:
            options["unsloth_tiled_mlp"] = True
            return found
    found[0]["unsloth_tiled_mlp"] = True  # its loader takes it among other keywords
    return found


def build(build: Build, stage: Stage) -> Subject:
    """Load the base in 4 bits and put a LoRA on every linear.

    Args:
        build: what to build.
        stage: told when imports, loading and attaching end.

    Returns:
        The subject.

    Raises:
        NotPossible: there is no GPU, no Unsloth, or it cannot do this.
    """
    if build.method != "lora":
        raise NotPossible(f"Unsloth trains no {build.method}")
    if build.device != "cuda":
        raise NotPossible("Unsloth needs a GPU")
    if find_spec("unsloth") is None:
        raise NotPossible("the package unsloth is not installed")
    return _build(build, stage)


def _build(build: Build, stage: Stage) -> Subject:  # needs a GPU
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    stage("imports")
    mode = "unsloth" if build.checkpointing else False
    loading, attaching = _options(
        build, FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model
    )
    base, _ = FastLanguageModel.from_pretrained(
        model_name=build.checkpoint,
        max_seq_length=build.longest,
        dtype=build.torch_dtype,
        load_in_4bit=True,
        use_gradient_checkpointing=mode,
        **loading,
    )
    stage("loaded")
    model = FastLanguageModel.get_peft_model(
        base,
        r=build.rank,
        target_modules=list(LINEARS),
        lora_alpha=2 * build.rank,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=mode,
        random_state=build.seed,
        **attaching,
    )
    if build.adapter is not None:
        import peft
        from safetensors.torch import load_file

        state = load_file(Path(build.adapter) / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(model, state)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    stage("attached", f"{sum(p.numel() for p in parameters):,} trained, {parameters[0].dtype}")
    plain = "plain" in build.switches

    def loss(batch: Batch) -> Tensor:
        cast = contextlib.nullcontext() if plain else torch.autocast("cuda", build.torch_dtype)
        with cast:
            found: Tensor = model(**batch).loss
        return found

    return Subject(
        model=model,
        loss=loss,
        parameters=parameters,
        optimizer=make_optimizer(build.optimizer, parameters, build.learning_rate),
    )
