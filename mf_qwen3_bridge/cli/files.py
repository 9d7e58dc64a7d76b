"""The commands that write checkpoints: ``mf-qwen3 convert`` and ``export``, and what scripts/ calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mf_qwen3_bridge.errors import BridgeError

if TYPE_CHECKING:
    from mf_qwen3_bridge.inputs.rank_files import RankFiles

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


_command = partial(click.command, context_settings={"help_option_names": ["-h", "--help"]})


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_config = click.option("--config", type=DIRECTORY, metavar="YAML", help="MindFormers YAML of the training run.")
_dry_run = click.option("--dry_run", is_flag=True, help="Say what would be done; write nothing.")
_number_options = _options(*(click.option(f"--{name}", type=click.IntRange(1), metavar="N") for name in NUMBERS))
_strategies = partial(
    click.option, "--src_strategy_dirs", type=DIRECTORY, metavar="DIR", help="The run's strategy folder."
)
_rank_dirs = partial(
    click.option, "--mindspore_ckpt_dir", type=DIRECTORY, metavar="DIR", help="Holds rank_0, rank_1, ..."
)
_file_suffix = click.option(
    "--file_suffix", metavar="EPOCH_STEP", help="Of the ranks' files; needed if there are several."
)
_rank_options = _options(_strategies(), _rank_dirs(), _file_suffix)
_export_options = _options(
    click.option("--hf_config", type=DIRECTORY, metavar="DIR", help="Hugging Face directory of the model."),
    _config,
    _number_options,
    click.option("--dtype", type=_DTYPE, default="bf16", show_default=True, help="Of the tensors that are written."),
    click.option("--max_shard_size", default="5GB", show_default=True, metavar="SIZE", help="Of a Hugging Face file."),
    click.option("--write_tied_lm_head", is_flag=True, help="Store lm_head although it is tied to the embedding."),
    _dry_run,
)


@_command()
@click.option("--model_dir", type=DIRECTORY, metavar="DIR", required=True, help="Hugging Face directory.")
@click.option("--output_dir", type=DIRECTORY, metavar="DIR", required=True, help="Is made; may exist if empty.")
@click.option("--load_checkpoint", type=DIRECTORY, metavar="DIR", help="Weights, when not in --model_dir.")
@click.option("--layout", type=click.Choice(["train", "infer"]), default="train", show_default=True)
@_config
@click.option("--tp", type=click.IntRange(1), metavar="N", help="A directory per rank: tensor parallel size.")
@click.option("--ep", type=click.IntRange(1), metavar="N", help="A directory per rank: expert parallel size.")
@click.option("--dtype", type=_DTYPE, help="Of the tensors that are written  [default: as they are].")
@_dry_run
def convert(
    model_dir: Path,
    output_dir: Path,
    load_checkpoint: Path | None,
    layout: str,
    config: Path | None,
    tp: int | None,
    ep: int | None,
    dtype: str | None,
    dry_run: bool,
) -> None:
    """Convert a Hugging Face checkpoint to MindFormers', for its training or its inference network.

    train: for MindFormers' trainer, and for load_weights of its inference network; --config says its layout flags.
    infer: for load_param_into_net on the inference network.
    """
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.inputs import preflight
    from mf_qwen3_bridge.inputs.mindformers_yaml import MindFormersYaml, read_mindformers_yaml
    from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT
    from mf_qwen3_bridge.model.parallel import ParallelConfig
    from mf_qwen3_bridge.model.rules import INFER, Dialect

    model = preflight.check(model_dir, config, load_checkpoint)
    trained = model.training_layout or TRAINING_DEFAULT
    if layout == "train" and tp and trained.tensor_parallel not in (1, tp):
        raise BridgeError(f"--tp {tp}: {config} says model_parallel {trained.tensor_parallel}; leave out one")
    yaml = read_mindformers_yaml(config) if config else MindFormersYaml()
    if layout == "train" and (tp or ep) and (problems := list(yaml.slice_problems())):
        raise BridgeError(f"a run with {config} needs other slices", problems)
    target = INFER if layout == "infer" else Dialect(trained.on(tp or trained.tensor_parallel))
    if tp or ep:
        size = tp or (yaml.training_tensor_parallel if layout == "train" else 1)
        job = jobs.to_ranks(model, target, output_dir, ParallelConfig(size, ep or 1), dtype)
    else:
        job = jobs.to_mindformers(model, target, output_dir, dtype)
    make(job, dry_run)


@_command()
@click.option("--input_path", type=DIRECTORY, metavar="DIR", help="Merged training checkpoint.")
@_rank_options
@click.option("--output_path", type=DIRECTORY, metavar="DIR", required=True, help="Is made; may exist if empty.")
@_export_options
def export(
    input_path: Path | None,
    src_strategy_dirs: Path | None,
    mindspore_ckpt_dir: Path | None,
    file_suffix: str | None,
    output_path: Path,
    **options: Any,
) -> None:
    """Convert a MindFormers training checkpoint to a complete Hugging Face directory.

    The checkpoint is --input_path, merged, or what the ranks saved: --mindspore_ckpt_dir with --src_strategy_dirs.
    What the model is, its tensors say; --hf_config, --config and numbers are held against that.
    """
    if (input_path is None) == (mindspore_ckpt_dir is None) or (mindspore_ckpt_dir is None) != (
        src_strategy_dirs is None
    ):
        raise click.UsageError("give --input_path, or --mindspore_ckpt_dir and --src_strategy_dirs")
    if input_path and file_suffix:
        raise click.UsageError("--file_suffix chooses among ranks' files; --input_path is merged")
    if mindspore_ckpt_dir and src_strategy_dirs:
        ranks = _ranks(src_strategy_dirs, mindspore_ckpt_dir, file_suffix, weights_only=True)
        _export(ranks, output_path, options)
    elif input_path:
        _export(input_path, output_path, options)


@_command()
@_options(*(option(required=True) for option in (_strategies, _rank_dirs)))
@click.option("--output_dir", type=DIRECTORY, metavar="DIR", required=True, help="Holds the result's directory.")
@_file_suffix
@click.option("--filter_out_param_prefix", metavar="PREFIX", help="Leave these out: adam_, the optimizer's state.")
@click.option("--has_redundancy", type=bool, default=True, show_default=True, help="Taken for compatibility.")
@_dry_run
def unify(
    src_strategy_dirs: Path,
    mindspore_ckpt_dir: Path,
    output_dir: Path,
    file_suffix: str | None,
    filter_out_param_prefix: str | None,
    has_redundancy: bool,
    dry_run: bool,
) -> None:
    """Merge what the ranks of a training run saved.

    The result is in OUTPUT_DIR/FILE_SUFFIX_ckpt_convert/unified_safe. Each part of each parameter is taken from
    whichever rank's file holds it, so --has_redundancy makes no difference.
    """
    from mf_qwen3_bridge.convert import jobs

    ranks = _ranks(src_strategy_dirs, mindspore_ckpt_dir, file_suffix, without_prefix=filter_out_param_prefix)
    output = output_dir / (f"{file_suffix}_ckpt_convert" if file_suffix else "ckpt_convert") / "unified_safe"
    make(jobs.unify(ranks, output), dry_run)


def _ranks(src_strategy_dirs: Path, mindspore_ckpt_dir: Path, file_suffix: str | None, **which: Any) -> RankFiles:
    from mf_qwen3_bridge.inputs.rank_files import open_rank_files
    from mf_qwen3_bridge.inputs.strategies import read_strategies

    return open_rank_files(mindspore_ckpt_dir, read_strategies(src_strategy_dirs), file_suffix, **which)


@_command()
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
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.inputs import preflight
    from mf_qwen3_bridge.inputs.identify import holds_experts
    from mf_qwen3_bridge.model.rules import TRAIN
    from mf_qwen3_bridge.transfer.safetensors import open_checkpoint

    has_experts = holds_experts(open_checkpoint(input_path))
    if has_experts != (kind == "qwen3-moe"):
        found = "has experts (qwen3-moe)" if has_experts else "has no experts (qwen3)"
        raise BridgeError(f"--model {kind}: {input_path} {found}")
    context = click.get_current_context()
    for name in () if is_reversed else ("max_shard_size", "write_tied_lm_head"):
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} needs --reversed")
    if is_reversed:
        _export(input_path, output_path, options, defaults=_DEFAULTS[kind])
        return
    config = options["config"]
    model = preflight.check(options["hf_config"] or input_path, config, input_path, _numbers(options))
    target = replace(TRAIN, layout=model.training_layout or TRAIN.layout)
    make(jobs.to_mindformers(model, target, output_path, options["dtype"]), options["dry_run"])


def _numbers(options: Mapping[str, Any]) -> dict[str, int]:
    return {name: options[name] for name in NUMBERS if options[name] is not None}


def _export(
    source: Path | RankFiles, output_path: Path, options: Mapping[str, Any], defaults: Mapping[str, int] | None = None
) -> None:
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.convert.file_layout import parse_size
    from mf_qwen3_bridge.inputs.layout_evidence import check_layout
    from mf_qwen3_bridge.inputs.trained import check_trained
    from mf_qwen3_bridge.transfer.safetensors import open_checkpoint

    ranks = None if isinstance(source, Path) else source
    checkpoint = ranks.checkpoint if ranks else open_checkpoint(Path(str(source)))
    hf_config, config, numbers = options["hf_config"], options["config"], _numbers(options)
    origin = "arguments"
    beside = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if defaults and not (hf_config or config or (beside / "config.json").is_file()):
        numbers, origin = {**defaults, **numbers}, "arguments and defaults"
    model = check_trained(checkpoint, hf_config, config, numbers, ranks.tensor_parallel if ranks else None, origin)
    job = jobs.to_hf(
        model,
        output_path,
        options["dtype"],
        parse_size(options["max_shard_size"]),
        options["write_tied_lm_head"],
        layout_is_shown=check_layout(model),
    )
    make(job, options["dry_run"])


def make(job: Any, dry_run: bool) -> None:
    """Carries out a job, or says what it would do."""
    from mf_qwen3_bridge.convert.run import describe, run
    from mf_qwen3_bridge.convert.workers import this_worker

    worker = this_worker()
    if worker is None:
        return
    job.directory().check()
    for line in describe(job):
        click.echo(line)
    if dry_run:
        click.echo("result      nothing was written (--dry_run)")
        return
    try:
        summary = run(job, worker)
    except KeyboardInterrupt:
        click.echo(f"interrupted: {job.directory().incomplete} is kept, and the same command goes on with it", err=True)
        raise
    for line in summary.lines() if summary else ():
        click.echo(line)
