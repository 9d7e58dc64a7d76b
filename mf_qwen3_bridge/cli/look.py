"""The commands that look, ``mf-qwen3 inspect`` and ``doctor``; and ``truncate``, which makes a small model."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mf_qwen3_bridge.cli.files import DIRECTORY, adapter_option, examples, make
from mf_qwen3_bridge.errors import BridgeError, fold_names, table

if TYPE_CHECKING:
    from mf_qwen3_bridge.inputs.identify import Weights
    from mf_qwen3_bridge.verify.layer_errors import LayerErrors


@click.command(
    short_help="Describe a checkpoint by its headers.",
    epilog=examples("mf-qwen3 inspect Qwen3-8B", "mf-qwen3 inspect output/checkpoint --rules"),
)
@click.argument("path", type=DIRECTORY, metavar="DIR")
@adapter_option
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--rules", is_flag=True, help="List every tensor, and the MindFormers parameter that it is part of.")
@click.option("--json", "as_json", is_flag=True, help="All of it as JSON.")
def inspect(path: Path, adapters: tuple[str, ...], tensors: bool, rules: bool, as_json: bool) -> None:
    """Say what is in a checkpoint, by its headers: model, names, layout, dtypes, anything unusual.

    DIR holds Hugging Face or MindFormers weights, or a directory for each rank; it may be a single file.
    """
    from mf_qwen3_bridge.inputs import inspection

    found = inspection.inspect(path, adapters)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    for line in inspection.lines(found):
        click.echo(line)
    if tensors or rules:
        columns = ("name", "dtype", "shape", "file", "parameter") if rules else ("name", "dtype", "shape", "file")
        click.echo("\n" + "\t".join(columns))
        for row in found.tensors:
            click.echo("\t".join(str(getattr(row, column)) for column in columns))


@click.command(
    short_help="Check weights: sound, equal, computing the same.",
    epilog=examples(
        "mf-qwen3 verify Qwen3-8B",
        "mf-qwen3 verify Qwen3-8B converted",
        "mf-qwen3 verify Qwen3-8B --logits --layers 2",
    ),
)
@click.argument("first", type=DIRECTORY, metavar="A")
@click.argument("second", type=DIRECTORY, metavar="[B]", required=False)
@click.option("--config", type=DIRECTORY, metavar="YAML", help="Of the training run of MindFormers weights.")
@adapter_option
@click.option("--logits", is_flag=True, help="Run A in MindFormers on the CPU, against a reference of B, or of itself.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="With --logits  [default: what fits in memory].")
@click.option("--hf_config", type=DIRECTORY, metavar="DIR", help="With --logits: config.json  [default: B's, or A's].")
@click.option(
    "--picture", type=DIRECTORY, metavar="FILE", help="With --logits  [default: verify.png, or verify1.png...]."
)
def verify(
    first: Path,
    second: Path | None,
    config: Path | None,
    adapters: tuple[str, ...],
    logits: bool,
    layers: int | None,
    hf_config: Path | None,
    picture: Path | None,
) -> None:
    """Are the weights sound? With two checkpoints, in any two dialects: do they hold the same, bit for bit?

    Of one: no NaN, no infinity, no tensor all zero; what its values look like, and which stand out.

    With --adapter, A is the base with the adapter merged.

    With --logits: does MindFormers' inference network compute what it should, layer by layer, and where does it go
    wrong? A table, and a picture of it.

    Exit code 0: nothing is wrong, or both are equal. 2: a table says where, and what may have happened.
    """
    if logits:
        _verify_logits(first, second, config, adapters, hf_config, layers, picture)
        return
    for name, value in (("--layers", layers), ("--hf_config", hf_config), ("--picture", picture)):
        if value is not None:
            raise click.UsageError(f"{name} needs --logits")
    if second:
        _verify_two(first, second, config, adapters)
    else:
        _verify_one(first, config, adapters)


def _verify_one(path: Path, config: Path | None, adapters: tuple[str, ...]) -> None:
    from mf_qwen3_bridge.inputs.identify import open_weights
    from mf_qwen3_bridge.inputs.opening import open_source
    from mf_qwen3_bridge.inputs.preflight import check_trained
    from mf_qwen3_bridge.verify import statistics as weight_statistics

    has_config = (path / "config.json").is_file()
    if has_config:
        weights: Weights = check_trained(open_source(path), path, config, adapters=adapters)
    else:
        weights = open_weights(path, config, adapters)
    statistics = weight_statistics.measure(weights)
    is_assumed = not (weights.dialect.is_hf or weights.source.declared_layout or config)
    note = ", its layout assumed: nothing declares it" if is_assumed else ""
    click.echo(f"checkpoint  {weights.dialect}, {len(weights.source.tensors)} tensors{note}")
    _echo_adapters(weights)
    headers = ["tensors", "number", "RMS: least, median, greatest", "mean", "values"]
    click.echo(table(headers, weight_statistics.rows(statistics), "simple"))
    for line in weight_statistics.outliers(statistics):
        click.echo(f"unusual     {line}")
    click.echo("result      no NaN, no infinity, no tensor all zero")


def _echo_adapters(weights: Weights) -> None:
    for adapter in weights.source.adapters:
        click.echo(f"adapter     {adapter.description}")


def _verify_two(first: Path, second: Path, config: Path | None, adapters: tuple[str, ...]) -> None:
    from mf_qwen3_bridge.inputs.identify import open_weights
    from mf_qwen3_bridge.transfer.progress import size_text
    from mf_qwen3_bridge.verify.comparison import compare

    weights = open_weights(first, config, adapters)
    _echo_adapters(weights)
    report = compare(weights, open_weights(second, config))
    if not report.is_equal:
        raise BridgeError(f"{first} and {second} do not hold the same weights", report.problems())
    if report.ignored:
        names = ", ".join(fold_names(report.ignored)[:4])
        click.echo(f"note        {len(report.ignored)} tensors are state of a training run, and not compared: {names}")
    click.echo(f"equal       {report.num_tensors} tensors, {size_text(report.nbytes)}, bit for bit")


def _verify_logits(
    first: Path,
    second: Path | None,
    config: Path | None,
    adapters: tuple[str, ...],
    hf_config: Path | None,
    layers: int | None,
    picture: Path | None,
) -> None:
    from mf_qwen3_bridge.mindformers.quiet import silence_upstream
    from mf_qwen3_bridge.verify.comparison import compare
    from mf_qwen3_bridge.verify.layer_errors import check_comparable, layers_that_fit

    if picture and not picture.parent.is_dir():
        raise BridgeError(f"{picture.parent} does not exist: --picture needs a directory that does")
    paths = [path for path in (first, second) if path]
    models = check_comparable(paths, config, hf_config, adapters)
    _echo_adapters(models[0])
    num_layers = layers or layers_that_fit(models[0])
    total = models[0].spec.num_layers
    models = [model.first_layers(num_layers) for model in models]

    with silence_upstream():  # takes seconds
        from mf_qwen3_bridge.mindformers.verify_network import measure_checkpoint
    found = measure_checkpoint(models[0], models[-1])
    network = "InferenceQwen3MoeForCausalLM" if models[0].spec.is_moe else "InferenceQwen3ForCausalLM"
    click.echo(f"layers      {num_layers} of {total}, in MindFormers' {network} on the CPU, float32")
    click.echo(table(["layer", *found.stages], found.rows(), "simple"))
    _draw(found, first, picture)
    # What 16 tokens did not reach: rows of the embedding, experts.
    report = compare(*models) if second else None
    if found.begin or (report and report.different):
        what = "does not compute the same" if found.begin else "computes the same for these tokens, from other weights"
        raise BridgeError(f"{first} {what}: {found.summary}", report.problems() if report else ())
    click.echo(f"result      {found.summary}")


def _draw(found: LayerErrors, first: Path, picture: Path | None) -> None:
    """Draws to the file that was asked for, else to the first free name."""
    from mf_qwen3_bridge.verify.picture import draw

    names = (Path(f"verify{number or ''}.png") for number in count())
    picture = picture or next(name for name in names if not name.exists())
    try:
        draw(found, first.name, picture)
    except ModuleNotFoundError:
        click.echo("picture     none: pip install 'mf-qwen3-bridge[picture]'")
    except BridgeError as error:
        click.echo(f"picture     none: {error}")
    else:
        click.echo(f"picture     {picture}")


@click.command(
    short_help="Keep the first layers of a model.",
    epilog=examples("mf-qwen3 truncate Qwen3-235B-A22B --layers 1 --output_dir one-layer"),
)
@click.argument("model_dir", type=DIRECTORY, metavar="DIR")
@click.option("--layers", type=click.IntRange(1), required=True, metavar="N", help="How many to keep.")
@click.option("--output_dir", type=DIRECTORY, metavar="DIR", required=True, help="Created; may exist if empty.")
@click.option("--dry_run", is_flag=True, help="Say what would be done; write nothing.")
def truncate(model_dir: Path, layers: int, output_dir: Path, dry_run: bool) -> None:
    """Keep the first layers of a model, byte for byte, to try every step with a model of 235B in a minute.

    It computes what those layers compute, which is no text.
    """
    from mf_qwen3_bridge.convert import jobs
    from mf_qwen3_bridge.inputs import preflight

    make(jobs.truncate(preflight.check(model_dir), layers, output_dir), dry_run)


@click.command(short_help="Describe the machine, for a bug report.", epilog=examples("mf-qwen3 doctor"))
def doctor() -> None:
    """Report packages, NPUs and environment variables, for a bug report."""
    from mf_qwen3_bridge.cli.doctor import examine

    click.echo(table(["what", "found", "what to do"], examine()))
