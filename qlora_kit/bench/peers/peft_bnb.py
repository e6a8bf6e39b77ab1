"""PEFT on a bitsandbytes NF4 base, with or without Liger's kernels.

As fast as these libraries get from their public functions: SDPA attention, non-reentrant
checkpointing, no `prepare_model_for_kbit_training` (it casts embeddings and head to
float32). Adapter weights are bfloat16 for speed (`masters` = `library`), so that nothing
is cast in a step; `float32` masters run under autocast, as Transformers' Trainer does it.
"""

import contextlib
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


def environment(_build: Build) -> dict[str, str]:
    """Variables that have to be set before the process starts."""
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def build(build: Build, stage: Stage) -> Subject:
    """Load the base in 4 bits and put a LoRA on every linear.

    Args:
        build: what to build; `peft_liger` needs a GPU.
        stage: told when imports, loading and attaching end.

    Returns:
        The subject.

    Raises:
        NotPossible: a library is missing, or cannot do this.
    """
    if build.method != "lora":
        raise NotPossible(f"PEFT trains no {build.method}")
    liger = build.impl == "peft_liger"
    if liger and (build.device != "cuda" or find_spec("liger_kernel") is None):
        raise NotPossible("Liger's kernels need a GPU and the package liger-kernel")
    import peft

    base = _load(build, stage, liger=liger)
    if build.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    masters = build.masters == "float32"
    torch.manual_seed(build.seed)
    if build.adapter is None:
        lora = peft.LoraConfig(
            r=build.rank,
            lora_alpha=2 * build.rank,
            target_modules="all-linear",
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(base, lora, autocast_adapter_dtype=masters)
    else:
        model = peft.PeftModel.from_pretrained(
            base, Path(build.adapter), is_trainable=True, autocast_adapter_dtype=masters
        )
    model.train()  # in evaluation mode bitsandbytes repacks weights for some CPUs
    parameters = [p for p in model.parameters() if p.requires_grad]
    stage("attached", f"{sum(p.numel() for p in parameters):,} trained, {parameters[0].dtype}")
    mixed = masters and build.dtype != "float32"

    def loss(batch: Batch) -> Tensor:
        cast = (
            torch.autocast(build.device, build.torch_dtype) if mixed else contextlib.nullcontext()
        )
        with cast:
            found: Tensor = model(**batch).loss
        return found

    return Subject(
        model=model,
        loss=loss,
        parameters=parameters,
        optimizer=make_optimizer(build.optimizer, parameters, build.learning_rate),
    )


def _load(build: Build, stage: Stage, *, liger: bool) -> Any:
    """The base in 4 bits, quantized on the way if the checkpoint is not."""
    import transformers

    loader = transformers.AutoModelForCausalLM
    if liger:  # its loader patches transformers for this architecture
        import liger_kernel.transformers

        loader = liger_kernel.transformers.AutoLigerKernelForCausalLM
    stage("imports")
    config = transformers.AutoConfig.from_pretrained(build.checkpoint)
    options: dict[str, Any] = {}
    if getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=build.torch_dtype,
            llm_int8_skip_modules=["lm_head"],
        )
    base = loader.from_pretrained(
        build.checkpoint,
        dtype=build.torch_dtype,
        device_map={"": 0 if build.device == "cuda" else "cpu"},
        attn_implementation="sdpa",
        **options,
    )
    base.config.use_cache = False
    stage("loaded")
    return base
