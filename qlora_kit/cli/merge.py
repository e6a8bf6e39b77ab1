"""`qlora-kit merge`: write an adapter into its base, and say what that costs.

Merging changes a model a little: the merged weights are rounded, and if the
original base is used, the adapter corrects weights it was not trained on. Which
base serves better depends on the model, so `--report` measures both against the
unmerged model on held-out data.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_kit.cli.arguments import Parser
from qlora_kit.cli.logs import setup_logging
from qlora_kit.cli.target import Target, load_target, resolve_target
from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.errors import ConfigError, FormatError
from qlora_kit.train.config import DataConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.export.deviation import Deviation
    from qlora_kit.export.merge import MergeSummary

Into = Literal["quantized", "original"]
INTOS: tuple[Into, ...] = ("quantized", "original")

_ABOUT = """\
Write an adapter into its base: a model that plain transformers loads, with its
tokenizer. Streams tensor by tensor, so memory stays small; the output appears
whole or not at all."""
_EXAMPLES = """\
examples:
  qlora-kit merge runs/quickstart merged/
  qlora-kit merge runs/quickstart merged/ --into original --dtype float16
  qlora-kit merge runs/quickstart merged/ --report test.jsonl --limit 200
  qlora-kit merge runs/quickstart merged-nf4/ --nf4"""


def _parser() -> Parser:
    parser = Parser("merge", "ADAPTER OUT [options]", _ABOUT, _EXAMPLES)
    parser.add_argument("adapter", help="an adapter folder, or the folder of a run")
    parser.add_argument("out", help="folder to create")
    parser.add_argument(
        "--base",
        "--base-model",
        dest="base_model",
        metavar="PATH",
        help="the base, if it has moved since training",
    )
    parser.add_argument(
        "--into",
        choices=INTOS,
        default="quantized",
        help="quantized (default): the base as it was trained on, decoded; original: the 16-bit "
        "weights",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        metavar="NAME",
        default="bfloat16",
        help="of the merged weights: bfloat16 (default), float16 or float32",
    )
    parser.add_argument(
        "--nf4",
        action="store_true",
        help="quantize the merged model again: a bitsandbytes 4-bit checkpoint",
    )
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="merge nothing: check the adapter and copy it alone, to be shared",
    )
    parser.add_argument("--max-shard", default="5GB", metavar="SIZE", help="largest file")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, ...")
    report = parser.add_argument_group("report")
    report.add_argument(
        "--report",
        metavar="DATA",
        help="measure the deviation from the unmerged model on this data, for both bases",
    )
    report.add_argument("--limit", type=int, default=100, help="rows to measure (default 100)")
    report.add_argument("--batch-size", type=int, default=8, help="rows at a time (default 8)")
    report.add_argument("--max-length", type=int, default=1024, help="longest row in tokens")
    return parser


def run(argv: Sequence[str]) -> int:
    """Merge; see `qlora-kit merge --help`.

    Args:
        argv: the words after `qlora-kit merge`.

    Returns:
        0.

    Raises:
        ConfigError: there is no adapter, or flags contradict each other.
    """
    options = _parser().parse_args(argv)
    setup_logging()
    options.bits = None
    target = resolve_target(options.adapter, options)
    if target.adapter is None:
        raise ConfigError(
            f"{options.adapter} is no adapter but a whole model, as full fine-tuning saves it (it "
            "has no adapter_config.json): there is nothing to merge."
        )
    if options.report and (options.nf4 or options.adapter_only):
        raise ConfigError("--report goes with a 16-bit merge; leave out --nf4 and --adapter-only.")
    if options.report and target.task != "causal_lm":
        raise ConfigError("--report compares language models, and this adapter is a classifier's.")
    if options.adapter_only:
        from qlora_kit.export.adapter import export_adapter

        print(export_adapter(target.adapter, options.out, overwrite=options.overwrite))
        return 0
    if options.nf4:
        print(_requantize(target, options))
        return 0
    _merge(target, options, options.into, Path(options.out), overwrite=options.overwrite)
    if options.report:
        _report(target, options)
    return 0


def _requantize(target: Target, options: argparse.Namespace) -> Path:
    from qlora_kit.export.quantized import save_quantized

    return save_quantized(
        target.base,
        options.out,
        adapter=target.adapter,
        into=options.into,
        dtype=options.dtype,
        max_shard=options.max_shard,
        overwrite=options.overwrite,
        device=options.device,
        revision=target.revision,
    )


def _merge(
    target: Target, options: argparse.Namespace, into: Into, out: Path, *, overwrite: bool
) -> "MergeSummary":
    from qlora_kit.export.merge import merge

    assert target.adapter is not None
    return merge(
        target.base,
        target.adapter,
        out,
        into=into,
        dtype=options.dtype,
        max_shard=options.max_shard,
        overwrite=overwrite,
        device=options.device,
        revision=target.revision,
    )


def _report(target: Target, options: argparse.Namespace) -> None:
    """Compare both merges with the unmerged model; print a table and write it as JSON."""
    from qlora_kit.export.deviation import compare
    from qlora_kit.load.model import load

    model, tokenizer, _ = load_target(
        target, argparse.Namespace(dtype="auto", device=options.device)
    )
    batches = _batches(tokenizer, options)
    found: dict[str, Deviation] = {}
    for into in INTOS:
        try:
            with _merged(target, options, into) as folder:
                merged, _ = load(folder, quant=None, device=options.device)
                found[into] = compare(model, merged, batches)
                del merged
        except FormatError as error:  # a base that exists in 4 bits only has no original
            print(f"no figures for the {into} base: {error}")
    _print_table(found, options.into)
    path = Path(options.out) / "merge_report.json"
    content = {
        "adapter": options.adapter,
        "base": target.base,
        "written": options.into,
        "dtype": options.dtype,
        "data": options.report,
        "deviation": {into: asdict(deviation) for into, deviation in found.items()},
    }
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")
    print(f"report: {path}")


@contextmanager
def _merged(target: Target, options: argparse.Namespace, into: Into) -> Iterator[Path]:
    """The merge that was written, or another one for as long as it is looked at."""
    if into == options.into:
        yield Path(options.out)
        return
    with tempfile.TemporaryDirectory(dir=Path(options.out).resolve().parent) as folder:
        _merge(target, options, into, Path(folder) / "merged", overwrite=False)
        yield Path(folder) / "merged"


def _batches(
    tokenizer: "PreTrainedTokenizerBase", options: argparse.Namespace
) -> "list[dict[str, Tensor]]":
    """The rows to compare on, tokenized as in training, padded in batches."""
    from qlora_kit.train.data.collate import make_collator
    from qlora_kit.train.data.dataset import build_dataset

    config = DataConfig(
        train=options.report,
        eval=options.report,
        max_length=options.max_length,
        limit_eval=options.limit,
    )
    data = build_dataset(config, tokenizer, "eval")
    collate = make_collator(data)
    size = options.batch_size
    return [collate(list(data)[i : i + size]) for i in range(0, len(data), size)]


def _print_table(found: "dict[str, Deviation]", written: str) -> None:
    """Both bases side by side."""
    print("\ndeviation from the unmerged model, per token")
    print(f"  {'merged into':<14}{'KL':>10}{'same top token':>17}{'loss':>10}{'unmerged':>11}")
    for into, deviation in found.items():
        mark = " <- written" if into == written else ""
        print(
            f"  {into:<14}{deviation.kl:>10.5f}{deviation.top1_agreement:>17.1%}"
            f"{deviation.loss_other:>10.4f}{deviation.loss_reference:>11.4f}{mark}"
        )
    tokens = max((deviation.tokens for deviation in found.values()), default=0)
    print(f"  on {tokens:,} tokens; a KL of 0.001 is invisible, 0.1 is a different model")
