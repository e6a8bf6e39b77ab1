"""One run, described once: the schema of the YAML file and of the flags.

Every field is a YAML key and a command line flag (`--train.epochs 2`), both
generated from these dataclasses, and so is docs/configuration.md. The module
imports no torch, so that `--help` stays fast.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_kit.adapters.adalora.config import RankBudget
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.quant.config import QuantConfig

Task = Literal["causal_lm", "sequence_classification"]
DataFormat = Literal[
    "auto", "prompt_completion", "messages", "sharegpt", "alpaca", "text", "classification"
]
EvalTask = Literal["auto", "perplexity", "choice", "exact_match", "classification"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    path: str
    """A local folder, a `.gguf` file or a hub id."""
    bits: Literal[4, 16] = 4
    """4: NF4, quantized while it loads. 16: leave the base as it is."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """`auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`."""
    task: Task = "causal_lm"
    """Text generation, or a class per text (encoder models)."""
    labels: tuple[str, ...] = ()
    """Class names for `sequence_classification`, in the order of their ids."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` lets Transformers choose."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantize_head: bool = False
    """Store the output head in NF4 as well: less memory, and logits a little off."""
    embeddings_on_host: bool = False
    """Keep the input embeddings in host memory, from where a GPU reads the rows that it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Rows to train and to evaluate on."""

    train: str
    """A .jsonl, .json, .csv or .parquet file, a `datasets` folder, or a hub id."""
    eval: str | None = None
    """Held-out rows, in the same notation. None: take `eval_fraction` of `train`."""
    eval_sets: dict[str, str] = field(default_factory=dict)
    """More held-out rows, each measured and reported under its name."""
    train_split: str = "train"
    """Split to read from a data set that has several."""
    eval_split: str = "validation"
    """Split to read for `eval`."""
    eval_fraction: float = 0.0
    """Share of `train` held out when `eval` is not given; 0 evaluates nothing."""
    format: DataFormat = "auto"
    """How rows are laid out; `auto` decides by their columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename columns before reading: your name to the expected name."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message."""
    max_length: int = 1024
    """Longest example in tokens; longer ones are cut at the end and counted."""
    long_text: Literal["split", "cut"] = "split"
    """Raw text longer than max_length: split it into several examples, or cut it."""
    packing: bool = False
    """Fill each row with several examples; attention stays within each example."""
    loss_on: Literal["completion", "assistant", "all"] = "completion"
    """Tokens that count: the last answer, every assistant turn, or all of them."""
    limit_train: int | None = None
    """Use only the first rows."""
    limit_eval: int | None = None
    """Use only the first held-out rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The optimization; the loop is `transformers.Trainer`."""

    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Stop after this many updates; -1 means by epochs."""
    batch_size: int = 8
    """Rows per forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per update."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: str = "linear"
    """A Transformers schedule: constant, linear, cosine, constant_with_warmup, ..."""
    warmup_ratio: float = 0.03
    """Share of the updates spent warming up."""
    weight_decay: float = 0.0
    """Decoupled weight decay on the adapter."""
    max_grad_norm: float = 0.3
    """Gradients are clipped to this norm; 0 turns clipping off."""
    optimizer: str = "adamw_torch"
    """A Transformers optimizer: adamw_torch, adamw_8bit, paged_adamw_8bit, ..."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""
    step: Literal["auto", "fused", "compiled", "eager"] = "auto"
    """How layers run: `fused` as one step each, by torch.compile, or by the model's own code."""
    activations: str = "auto"
    """What fused layers keep for the backward: save, recompute_elementwise, recompute_all, ..."""
    keep_decoded: int | None = None
    """Layers whose 4-bit weights stay decoded, for speed; null: as planned, none without a plan."""
    tile: Literal["auto"] | int | None = "auto"
    """Tokens that fused layers treat at a time, for long rows; null: all at once."""
    group_by_length: bool = True
    """Batch rows of similar length together, to waste less on padding."""
    seed: int = 0
    """Seed of data order, adapter start and dropout."""
    deterministic: bool = False
    """Ask torch for repeatable kernels throughout; slower."""
    log_every: int = 5
    """Updates between two log lines."""
    eval_every: int | None = None
    """Updates between evaluations of the held-out loss; None: only at the end."""
    save_every: int | None = None
    """Updates between checkpoints; None: only at the end of each epoch."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    early_stopping: int | None = None
    """Stop after this many evaluations without improvement; needs eval_every."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where Transformers reports to: tensorboard, wandb, trackio, mlflow, ...; empty for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """What is measured on held-out rows, before and after training."""

    task: EvalTask = "auto"
    """`choice`: the label whose first token is likeliest; `exact_match`: generate and compare."""
    choices: tuple[str, ...] = ()
    """The labels of `choice`; empty: the completions that occur."""
    before: bool = True
    """Measure the base model as well."""
    samples: int = 5
    """Answers shown before and after training."""
    batch_size: int = 16
    """Rows per evaluation batch."""
    max_new_tokens: int = 128
    """Longest generated answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What is written besides the adapter."""

    merge: bool = False
    """Write a merged 16-bit model when training ends."""
    into: Literal["quantized", "original"] = "quantized"
    """Merge into the dequantized base the adapter was trained on, or into the original one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the merged weights."""
    max_shard_size: str = "5GB"
    """Largest file of the merged model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole fine-tuning run: `qlora-kit train run.yaml`."""

    model: ModelConfig
    """The frozen base."""
    data: DataConfig
    """Training and held-out rows."""
    method: Literal[
        "lora",
        "rslora",
        "lora_fa",
        "adalora",
        "dora",
        "bottleneck",
        "bitfit",
        "glora",
        "top_k",
        "full",
        "prefix_tuning",
        "prompt_tuning",
    ] = "lora"
    """How the model is adapted."""
    adapter: LoRA = field(default_factory=LoRA)
    """Size and place of the adapter."""
    adalora: RankBudget = field(default_factory=RankBudget)
    """How ranks fall, for method adalora."""
    bottleneck: Bottleneck = field(default_factory=Bottleneck)
    """Kind and size, for method bottleneck."""
    bitfit: BitFit = field(default_factory=BitFit)
    """Which biases, for method bitfit."""
    glora: GLoRA = field(default_factory=GLoRA)
    """Which supports, for method glora."""
    top_k: TopK = field(default_factory=TopK)
    """Which blocks, for method top_k."""
    full: Full = field(default_factory=Full)
    """How all weights are held, for method full."""
    prefix_tuning: PrefixTuning = field(default_factory=PrefixTuning)
    """Length and MLP, for method prefix_tuning."""
    prompt_tuning: PromptTuning = field(default_factory=PromptTuning)
    """Length and layers, for method prompt_tuning."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """How the base is stored when `model.bits` is 4."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimization."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurements on held-out rows."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Merged model."""
    plan: Literal["auto", "off"] = "auto"
    """`auto`: on a GPU, predict memory first, refuse what cannot fit and choose `auto` settings."""
    budget: str = "auto"
    """GPU memory the run may take, such as 44GiB, enforced; `auto`: what the card has free."""
    output: str = "runs/run"
    """Folder for the adapter, checkpoints, logs, merged model and report."""
    resume: bool = False
    """Continue from the last checkpoint in `output`."""
    overwrite: bool = False
    """Allow writing into an `output` that already holds a finished run."""

    @property
    def settings(self) -> tuple[Any, ...]:
        """The sections that describe methods, for `make_adapter_config`."""
        return (
            self.adapter,
            self.adalora,
            self.bottleneck,
            self.bitfit,
            self.glora,
            self.top_k,
            self.full,
            self.prefix_tuning,
            self.prompt_tuning,
        )

    @property
    def base_quant(self) -> QuantConfig | None:
        """How the base is stored: `quant`, with the head if asked for; None for 16 bits."""
        if self.model.bits != 4:
            return None
        return self.quant.with_head() if self.model.quantize_head else self.quant
