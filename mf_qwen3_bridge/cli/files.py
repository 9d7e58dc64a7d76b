"""The commands that write checkpoints: ``mf-qwen3 convert`` and ``export``, and what scripts/ calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse

if TYPE_CHECKING:
    from mf_qwen3_bridge.convert.run import Job
    from mf_qwen3_bridge.inputs.source import Source

DIRECTORY = click.Path(path_type=Path)
_DTYPE = click.Choice(["bf16", "fp16", "fp32"])
# What MindFormers' own script asks for, under its names; here the tensors' shapes show them.
NUMBERS = (
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_routed_experts",
    "hidden_size",
    "moe_ffn_hidden_size",
    "ffn_hidden_size",
)
LAYOUT_OPTIONS = ("use_contiguous_weight_layout_attention", "use_interleaved_weight_layout_mlp")


def examples(*commands: str) -> str:
    """Formats commands as the end of a help text, an ``epilog`` whose lines click leaves as they are."""
    return "\n".join(("\b", "Examples:", *(f"  {command}" for command in commands)))


_command = partial(click.command, context_settings={"help_option_names": ["-h", "--help"]})


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_config = click.option("--config", type=DIRECTORY, metavar="YAML", help="MindFormers YAML of the training run.")
adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR[:SCALE]",
    help="PEFT adapter to merge when weights are read; several add up.",
)
_dry_run = click.option("--dry_run", is_flag=True, help="Say what would be done; write nothing.")
_number_options = _options(
    *(
        click.option(f"--{name}", type=click.IntRange(1), metavar="N", help="Held against the tensors.")
        for name in NUMBERS
    )
)
_layout_options = _options(
    *(click.option(f"--{name}", type=bool, metavar="BOOL", help="Of the training YAML.") for name in LAYOUT_OPTIONS),
    click.option("--model_parallel", type=click.IntRange(1), metavar="N", help="Of the training YAML."),
)


def _without_effect(name: str, reason: str, **kwargs: Any) -> Callable[..., Any]:
    """An option of MindFormers' own script that makes no difference here; a note says why."""

    def note(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            click.echo(f"note        --{name} makes no difference: {reason}")

    return click.option(f"--{name}", callback=note, expose_value=False, help="Makes no difference.", **kwargs)


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
    _layout_options,
    click.option("--dtype", type=_DTYPE, default="bf16", show_default=True, help="Of the tensors that are written."),
    click.option("--max_shard_size", default="5GB", show_default=True, metavar="SIZE", help="Of a Hugging Face file."),
    click.option("--write_tied_lm_head", is_flag=True, help="Store lm_head although it is tied to the embedding."),
    click.option("--lora", type=click.Choice(["merge", "adapter"]), help="Of a LoRA run: what to write."),
    click.option("--lora_alpha", type=click.FloatRange(0, min_open=True), metavar="N", help="If no file declares it."),
    _dry_run,
)


@_command(
    short_help="Convert Hugging Face to MindFormers, training or inference.",
    epilog=examples(
        "mf-qwen3 convert --model_dir Qwen3-8B --output_dir converted",
        "mf-qwen3 convert --model_dir Qwen3-30B-A3B --tp 2 --ep 8 --output_dir ranks",
        "mf-qwen3 convert --model_dir Qwen3-8B-FP8 --adapter lora --layout hf \\\n      --output_dir merged",
    ),
)
@click.option("--model_dir", type=DIRECTORY, metavar="DIR", required=True, help="Hugging Face directory.")
@click.option("--output_dir", type=DIRECTORY, metavar="DIR", required=True, help="Created; may exist if empty.")
@click.option("--load_checkpoint", type=DIRECTORY, metavar="DIR", help="Weights, when not in --model_dir.")
@adapter_option
@click.option("--layout", type=click.Choice(["train", "infer", "hf"]), default="train", show_default=True)
@_config
@click.option("--tp", type=click.IntRange(1), metavar="N", help="A directory per rank: tensor parallel size.")
@click.option("--ep", type=click.IntRange(1), metavar="N", help="A directory per rank: expert parallel size.")
@click.option("--dtype", type=_DTYPE, help="Of the tensors that are written  [default: as they are].")
@_dry_run
def convert(
    model_dir: Path,
    output_dir: Path,
    load_checkpoint: Path | None,
    adapters: tuple[str, ...],
    layout: str,
    config: Path | None,
    tp: int | None,
    ep: int | None,
    dtype: str | None,
    dry_run: bool,
) -> None:
    """Convert a Hugging Face checkpoint to MindFormers', for its training or its inference network.

    train: for MindFormers' trainer, and for load_weights of its inference network; --config declares its layout flags.
    infer: for load_param_into_net on the inference network.
    hf: a Hugging Face directory again, with --adapter merged; of a quantised one, its weights dequantised.
    """
    if layout == "hf" and (tp or ep):
        raise click.UsageError("--tp and --ep cut for MindFormers' ranks; --layout hf is whole")
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.inputs import preflight
    from mf_qwen3_bridge.inputs.mindformers_config import read_mindformers_config
    from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT
    from mf_qwen3_bridge.model.parallel import ParallelConfig
    from mf_qwen3_bridge.model.rules import INFER, Dialect

    yaml = read_mindformers_config(config)
    model = preflight.check(model_dir, yaml, load_checkpoint, adapters=adapters)
    if layout == "hf":
        make(jobs.to_plain_hf(model, output_dir, dtype), dry_run)
        return
    is_for_training = layout == "train"
    sizes = yaml.parallel_sizes(is_for_training)
    flags = (("--tp", tp, "tensor_parallel", "model_parallel"), ("--ep", ep, "expert_parallel", "expert_parallel"))
    problems = [
        Problem(flag, f"{value}\n{yaml.origin}: {key} {sizes[size]}", "leave out one of them")
        for flag, value, size, key in flags
        if value and sizes.get(size, value) != value
    ]
    problems += yaml.slice_problems() if (tp or ep) and is_for_training else ()
    refuse(f"--tp and --ep do not cut what a run with {config} reads", problems)
    trained = model.yaml_layout or TRAINING_DEFAULT
    target = INFER if layout == "infer" else Dialect(trained.on(tp or trained.tensor_parallel))
    if tp or ep:
        parallel = ParallelConfig(tp or sizes.get("tensor_parallel", 1), ep or sizes.get("expert_parallel", 1))
        job = jobs.to_ranks(model, target, output_dir, parallel, dtype)
    else:
        job = jobs.to_mindformers(model, target, output_dir, dtype)
    make(job, dry_run)


@_command(
    short_help="Convert a training checkpoint to Hugging Face.",
    epilog=examples(
        "mf-qwen3 export --input_path merged --hf_config Qwen3-8B --output_path tuned",
        "mf-qwen3 export --mindspore_ckpt_dir output/checkpoint \\\n"
        "      --src_strategy_dirs output/strategy --file_suffix 1000_1 \\\n"
        "      --hf_config Qwen3-8B --output_path tuned",
    ),
)
@click.option("--input_path", type=DIRECTORY, metavar="DIR", help="Merged training checkpoint.")
@_rank_options
@click.option("--output_path", type=DIRECTORY, metavar="DIR", required=True, help="Created; may exist if empty.")
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
    from mf_qwen3_bridge.inputs.opening import open_source

    path = input_path or mindspore_ckpt_dir
    assert path
    _export(open_source(path, src_strategy_dirs, file_suffix, weights_only=True), output_path, options)


@_command(
    short_help="Merge what a training run's ranks saved.",
    epilog=examples(
        "mf-qwen3 unify --mindspore_ckpt_dir output/checkpoint \\\n"
        "      --src_strategy_dirs output/strategy --file_suffix 1000_1 \\\n"
        "      --filter_out_param_prefix adam_ --output_dir unified"
    ),
)
@_options(*(option(required=True) for option in (_strategies, _rank_dirs)))
@click.option("--output_dir", type=DIRECTORY, metavar="DIR", required=True, help="Holds the result's directory.")
@_file_suffix
@click.option("--filter_out_param_prefix", metavar="PREFIX", help="Leave these out: adam_, the optimizer's state.")
@_without_effect(
    "has_redundancy", "each part of a parameter is taken from whichever rank's file holds it", type=bool, metavar="BOOL"
)
@_without_effect("max_process_num", "one process merges, with several threads", type=click.IntRange(1), metavar="N")
@click.option("--format", "file_format", type=click.Choice(["safetensors"]), default="safetensors", show_default=True)
@_dry_run
def unify(
    src_strategy_dirs: Path,
    mindspore_ckpt_dir: Path,
    output_dir: Path,
    file_suffix: str | None,
    filter_out_param_prefix: str | None,
    file_format: str,
    dry_run: bool,
) -> None:
    """Merge what the ranks of a training run saved.

    The result is in OUTPUT_DIR/FILE_SUFFIX_ckpt_convert/unified_safe.
    """
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.inputs.opening import open_source

    ranks = open_source(mindspore_ckpt_dir, src_strategy_dirs, file_suffix, without_prefix=filter_out_param_prefix)
    output = output_dir / (f"{file_suffix}_ckpt_convert" if file_suffix else "ckpt_convert") / "unified_safe"
    make(jobs.unify(ranks, output), dry_run)


@_command(
    epilog=examples(
        "python scripts/convert_weight.py --model qwen3 \\\n      --input_path Qwen3-8B --output_path converted",
        "python scripts/convert_weight.py --model qwen3 --reversed \\\n"
        "      --input_path merged --output_path tuned --hf_config Qwen3-8B",
    )
)
@click.option("--model", "kind", type=click.Choice(["qwen3-moe", "qwen3"]), required=True)
@click.option("--input_path", type=DIRECTORY, metavar="DIR", required=True, help="The checkpoint to convert.")
@click.option("--output_path", type=DIRECTORY, metavar="DIR", required=True, help="Created; may exist if empty.")
@click.option(
    "--reversed", "is_reversed", type=bool, is_flag=False, flag_value=True, default=False, help="MindFormers to HF."
)
@_without_effect("max_worker", "one process converts, with several threads", type=click.IntRange(1), metavar="N")
@_without_effect("qkv_concat", "MindFormers' Qwen3 always fuses q, k and v", type=bool, metavar="BOOL")
@_without_effect(
    "is_lora", "a LoRA is found by its tensors' names; --lora says what to write of it", type=bool, metavar="BOOL"
)
@_export_options
def convert_weight(kind: str, input_path: Path, output_path: Path, is_reversed: bool, **options: Any) -> None:
    """Convert Hugging Face to MindFormers (training layout) or, with --reversed, a merged training checkpoint back.

    The tensors' shapes show the model's numbers; those that are given are held against them.
    """
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.inputs import preflight
    from mf_qwen3_bridge.inputs.opening import open_source
    from mf_qwen3_bridge.model.rules import TRAIN

    source = open_source(input_path)
    if source.has_experts != (kind == "qwen3-moe"):
        found = "has experts (qwen3-moe)" if source.has_experts else "has no experts (qwen3)"
        raise BridgeError(f"--model {kind}: {input_path} {found}")
    context = click.get_current_context()
    of_reversed = ("max_shard_size", "write_tied_lm_head", *LAYOUT_OPTIONS, "model_parallel", "lora", "lora_alpha")
    for name in () if is_reversed else of_reversed:
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} needs --reversed")
    if is_reversed:
        _export(source, output_path, options)
        return
    model = preflight.check(options["hf_config"] or input_path, options["config"], source, _numbers(options))
    target = replace(TRAIN, layout=model.yaml_layout or TRAIN.layout)
    make(jobs.to_mindformers(model, target, output_path, options["dtype"]), options["dry_run"])


def _numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in (*NUMBERS, *LAYOUT_OPTIONS) if options[name] is not None}


def _export(source: Source, output_path: Path, options: Mapping[str, Any]) -> None:
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.convert.file_layout import parse_size
    from mf_qwen3_bridge.inputs.layout_detection import check_layout
    from mf_qwen3_bridge.inputs.preflight import check_trained

    numbers = _numbers(options)
    if source.lora:
        _export_lora(source, output_path, options)
        return
    for name in ("lora", "lora_alpha"):
        if options[name] is not None:
            raise BridgeError(f"--{name}: {source.path} is not of a LoRA run, it holds no lora tensors")
    model = check_trained(source, options["hf_config"], options["config"], numbers, options["model_parallel"])
    job = jobs.to_hf(
        model,
        output_path,
        options["dtype"],
        parse_size(options["max_shard_size"]),
        options["write_tied_lm_head"],
        layout_is_shown=check_layout(model),
    )
    make(job, options["dry_run"])


def _export_lora(source: Source, output_path: Path, options: Mapping[str, Any]) -> None:
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.convert.file_layout import parse_size
    from mf_qwen3_bridge.inputs.layout_detection import check_layout
    from mf_qwen3_bridge.inputs.lora_runs import read_lora_run
    from mf_qwen3_bridge.inputs.preflight import check, check_for_adapter, check_trained

    is_merged = options["lora"] == "merge"
    if options["lora"] is None:
        raise BridgeError(
            f"{source.path} is of a LoRA run. Choose what to write: --lora merge, the whole model with the adapter "
            "merged into its weights, or --lora adapter, a PEFT adapter for the model that the run began with"
        )
    run = read_lora_run(source, options["config"], options["lora_alpha"])
    given = options["hf_config"], options["config"], _numbers(options), options["model_parallel"]
    model = check_trained(run.base, *given) if run.has_base else check_for_adapter(source, *given)
    layout_is_shown = run.has_base and check_layout(model)
    run.check_trained(run.plan(model))
    if is_merged:
        sizes = parse_size(options["max_shard_size"]), options["write_tied_lm_head"]
        merged = (
            replace(model, source=run.merged()) if run.has_base else run.merged_into(check(model.hf_dir), model.dialect)
        )
        job = jobs.to_hf(merged, output_path, options["dtype"], *sizes, layout_is_shown=layout_is_shown)
        scaling = f"merged: LoRA of rank {run.rank}, alpha {run.alpha:g}"
        job = replace(job, notes=(scaling, *job.notes))
    else:
        is_asked = click.get_current_context().get_parameter_source("dtype") != ParameterSource.DEFAULT
        dtype = options["dtype"] if is_asked else None
        job = jobs.to_peft(run, model, output_path, dtype, options["hf_config"])
    make(replace(job, warning="" if layout_is_shown else jobs.layout_warning(model)), options["dry_run"])


def make(job: Job, dry_run: bool) -> None:
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
    else:
        try:
            summary = run(job, worker)
        except KeyboardInterrupt:
            kept = job.directory().incomplete
            click.echo(f"interrupted: {kept} is kept, and the same command goes on with it", err=True)
            raise
        for line in summary.lines() if summary else ():
            click.echo(line)
    if job.warning:
        click.echo(f"warning     {job.warning}")
