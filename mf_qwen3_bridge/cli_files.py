"""The commands that write checkpoints: ``mf-qwen3 convert`` and ``export``, and what scripts/ calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mf_qwen3_bridge.errors import BridgeError

DIRECTORY = click.Path(path_type=Path)
_DTYPE = click.Choice(["bf16", "fp16", "fp32"])
# Flags of SPEC's numbers, and the values of Qwen3-30B-A3B and Qwen3-0.6B.
_DEFAULTS: dict[str, dict[str, int]] = {
    "qwen3-moe": {
        "num_layers": 48,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "kv_channels": 128,
        "num_routed_experts": 128,
        "hidden_size": 2048,
        "moe_ffn_hidden_size": 768,
    },
    "qwen3": {
        "num_layers": 28,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "kv_channels": 128,
        "hidden_size": 1024,
        "ffn_hidden_size": 3072,
    },
}
NUMBERS = tuple(dict.fromkeys(name for defaults in _DEFAULTS.values() for name in defaults))


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_config = click.option("--config", type=DIRECTORY, metavar="YAML", help="MindFormers YAML of the training run.")
_dry_run = click.option("--dry_run", is_flag=True, help="Say what would be done; write nothing.")
_number_options = _options(*(click.option(f"--{name}", type=click.IntRange(1), metavar="N") for name in NUMBERS))
_export_options = _options(
    click.option("--hf_config", type=DIRECTORY, metavar="DIR", help="Hugging Face directory of the model."),
    _config,
    _number_options,
    click.option("--dtype", type=_DTYPE, default="bf16", show_default=True, help="Of the tensors that are written."),
    click.option("--max_shard_size", default="5GB", show_default=True, metavar="SIZE", help="Of a Hugging Face file."),
    click.option("--write_tied_lm_head", is_flag=True, help="Store lm_head although it is tied to the embedding."),
    _dry_run,
)


@click.command()
@click.option("--model_dir", type=DIRECTORY, metavar="DIR", required=True, help="Hugging Face directory.")
@click.option("--output_dir", type=DIRECTORY, metavar="DIR", required=True, help="Is made; may exist if empty.")
@click.option("--load_checkpoint", type=DIRECTORY, metavar="DIR", help="Weights, when not in --model_dir.")
@click.option("--layout", type=click.Choice(["train", "infer"]), default="train", show_default=True)
@_config
@click.option("--dtype", type=_DTYPE, help="Of the tensors that are written  [default: as they are].")
@_dry_run
def convert(
    model_dir: Path,
    output_dir: Path,
    load_checkpoint: Path | None,
    layout: str,
    config: Path | None,
    dtype: str | None,
    dry_run: bool,
) -> None:
    """Convert a Hugging Face checkpoint to MindFormers', for its training or its inference network.

    train: for MindFormers' trainer, and for load_weights of its inference network; --config says its layout flags.
    infer: for load_param_into_net on the inference network.
    """
    from mf_qwen3_bridge import jobs, preflight
    from mf_qwen3_bridge.rules import INFER, TRAIN

    model = preflight.check(model_dir, config, load_checkpoint)
    target = INFER if layout == "infer" else replace(TRAIN, layout=model.training_layout or TRAIN.layout)
    _make(jobs.to_mindformers(model, target, output_dir, dtype), dry_run)


@click.command()
@click.option("--input_path", type=DIRECTORY, metavar="DIR", required=True, help="Merged training checkpoint.")
@click.option("--output_path", type=DIRECTORY, metavar="DIR", required=True, help="Is made; may exist if empty.")
@_export_options
def export(input_path: Path, output_path: Path, **options: Any) -> None:
    """Convert a merged MindFormers training checkpoint to a complete Hugging Face directory.

    What the model is, its tensors say; --hf_config, --config and numbers are held against that.
    """
    _export(input_path, output_path, options)


@click.command()
@click.option("--model", "kind", type=click.Choice(list(_DEFAULTS)), required=True)
@click.option("--input_path", type=DIRECTORY, metavar="DIR", required=True, help="The checkpoint to convert.")
@click.option("--output_path", type=DIRECTORY, metavar="DIR", required=True, help="Is made; may exist if empty.")
@click.option(
    "--reversed", "is_reversed", type=bool, is_flag=False, flag_value=True, default=False, help="MindFormers to HF."
)
@_export_options
def convert_weight(kind: str, input_path: Path, output_path: Path, is_reversed: bool, **options: Any) -> None:
    """Convert Hugging Face to MindFormers (training layout) or, with --reversed, a merged training checkpoint back.

    Numbers that neither --hf_config nor --config gives are those of Qwen3-30B-A3B or Qwen3-0.6B.
    """
    from mf_qwen3_bridge import jobs, preflight
    from mf_qwen3_bridge.checkpoint import open_checkpoint
    from mf_qwen3_bridge.rules import TRAIN

    has_experts = any(".experts." in name for name in open_checkpoint(input_path).tensors)
    if has_experts != (kind == "qwen3-moe"):
        found = "has experts (qwen3-moe)" if has_experts else "has no experts (qwen3)"
        raise BridgeError(f"--model {kind}: {input_path} {found}")
    if is_reversed:
        _export(input_path, output_path, options, defaults=_DEFAULTS[kind])
        return
    config = options["config"]
    model = preflight.check(options["hf_config"] or input_path, config, input_path, _numbers(options))
    target = replace(TRAIN, layout=model.training_layout or TRAIN.layout)
    _make(jobs.to_mindformers(model, target, output_path, options["dtype"]), options["dry_run"])


def _numbers(options: Mapping[str, Any]) -> dict[str, int]:
    return {name: options[name] for name in NUMBERS if options[name] is not None}


def _export(
    input_path: Path, output_path: Path, options: Mapping[str, Any], defaults: Mapping[str, int] | None = None
) -> None:
    from mf_qwen3_bridge import jobs, preflight
    from mf_qwen3_bridge.files import parse_size

    hf_config, config, numbers = options["hf_config"], options["config"], _numbers(options)
    if not hf_config and not config:
        numbers = {**(defaults or {}), **numbers}
    job = jobs.to_hf(
        preflight.check_trained(input_path, hf_config, config, numbers),
        output_path,
        options["dtype"],
        parse_size(options["max_shard_size"]),
        options["write_tied_lm_head"],
    )
    _make(job, options["dry_run"])


def _make(job: Any, dry_run: bool) -> None:
    """Carries out a job, or says what it would do."""
    from mf_qwen3_bridge.convert import describe, run
    from mf_qwen3_bridge.parallel import this_worker

    worker = this_worker()
    if worker is None:
        return
    for line in describe(job):
        click.echo(line)
    if dry_run:
        job.directory().check()
        click.echo("result      nothing was written (--dry_run)")
        return
    summary = run(job, worker)
    for line in summary.lines() if summary else ():
        click.echo(line)
