"""The ``mf-qwen3`` command."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mf_qwen3_bridge import __version__
from mf_qwen3_bridge.cli.files import DIRECTORY, adapter_option, convert, examples, export, unify
from mf_qwen3_bridge.cli.look import doctor, inspect, truncate, verify
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.mindformers.quiet import silence_upstream
from mf_qwen3_bridge.model.parallel import num_processes

_REGISTER_PATH = Path(__file__).parents[1] / "mindformers" / "register_path"


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which checkpoint is meant."""
    for option in (
        click.option("--ep", type=click.IntRange(1), metavar="N", help="Expert parallel size  [default: 1]."),
        click.option(
            "--tp",
            type=click.IntRange(1),
            metavar="N",
            help="Tensor parallel size  [default: all processes].",
        ),
        adapter_option,
        click.option("--load_checkpoint", type=DIRECTORY, metavar="DIR", help="Weights, when not in --model_dir."),
        click.option("--config", type=DIRECTORY, metavar="YAML", help="MindFormers YAML to hold them against."),
        click.option("--model_dir", type=DIRECTORY, metavar="DIR", required=True, help="Hugging Face directory."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mf-qwen3")
def cli() -> None:
    """Qwen3 weights between Hugging Face and MindFormers: right, or with a clear refusal."""


for _command in (convert, export, unify, inspect, verify, truncate, doctor):
    cli.add_command(_command)


@cli.command(
    short_help="Check config.json, YAML and tensors against each other.",
    epilog=examples(
        "mf-qwen3 check --model_dir Qwen3-8B",
        "mf-qwen3 check --model_dir Qwen3-8B --config finetune_qwen3_8b.yaml",
    ),
)
@_model_options
def check(
    model_dir: Path,
    config: Path | None,
    load_checkpoint: Path | None,
    adapters: tuple[str, ...],
    tp: int | None,
    ep: int | None,
) -> None:
    """Check config.json, the YAML and the tensors' names, shapes and dtypes against each other (headers only).

    Exit code 0: they fit. 2: they don't; a table says what to change.
    """
    from mf_qwen3_bridge.inputs import preflight
    from mf_qwen3_bridge.inputs.summary import summary

    model = preflight.check(
        model_dir, config, load_checkpoint, adapters=adapters, tensor_parallel=tp, expert_parallel=ep
    )
    for line in summary(model):
        click.echo(line)


@cli.command(
    short_help="Run a checkpoint in MindFormers' inference model.",
    epilog=examples(
        "mf-qwen3 infer --model_dir Qwen3-8B --test_mode both",
        "mf-qwen3 infer --model_dir Qwen3-8B --prompt 'Hello' --max_new_tokens 8",
    ),
)
@_model_options
@click.option("--use_training_conversion", is_flag=True, help="Convert with MindFormers' own training class.")
@click.option("--tokenizer_path", type=DIRECTORY, metavar="DIR", help="Tokenizer directory  [default: --model_dir].")
@click.option("--test_mode", type=click.Choice(["generate", "chat", "both"]), default="generate", show_default=True)
@click.option("--prompt", multiple=True, help="Text to continue or answer; may be given several times.")
@click.option("--device_target", type=click.Choice(["auto", "Ascend", "CPU"]), default="auto", show_default=True)
@click.option("--max_new_tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--do_sample/--greedy", default=False, help="Sample, or take the most likely token  [default: greedy].")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="With --do_sample.")
@click.option("--top_k", type=click.IntRange(1), help="With --do_sample.")
@click.option("--top_p", type=click.FloatRange(0, 1, min_open=True), help="With --do_sample.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of --do_sample.")
@click.option("--repetition_penalty", type=click.FloatRange(0, min_open=True), help="Above 1: repeat less.")
@click.option("--enable_thinking/--no_thinking", default=False, help="Chat template's switch  [default: no_thinking].")
def infer(
    model_dir: Path,
    config: Path | None,
    load_checkpoint: Path | None,
    adapters: tuple[str, ...],
    tp: int | None,
    ep: int | None,
    use_training_conversion: bool,
    tokenizer_path: Path | None,
    test_mode: str,
    prompt: tuple[str, ...],
    device_target: str,
    enable_thinking: bool,
    **generation: Any,
) -> None:
    """Run a Hugging Face checkpoint in MindFormers' inference model, and say at each step what was found.

    On several cards, start it with msrun: the model is spread over all processes.
    """
    from mf_qwen3_bridge.inputs import preflight
    from mf_qwen3_bridge.inputs.summary import summary

    generation = {name: value for name, value in generation.items() if value is not None}
    sampling = generation.keys() & {"temperature", "top_k", "top_p"}
    if sampling and not generation["do_sample"]:
        raise click.UsageError(f"--{min(sampling)} needs --do_sample")
    model = preflight.check(
        model_dir,
        config,
        load_checkpoint,
        adapters=adapters,
        tensor_parallel=tp,
        expert_parallel=ep,
        num_processes=num_processes(),
    )
    for line in summary(model):
        click.echo(line)

    with silence_upstream():
        # Takes seconds: what is wrong with the checkpoint is known before.
        from mf_qwen3_bridge.mindformers import infer as inference
        from mf_qwen3_bridge.mindformers.load import load_network

        tokenizer = inference.load_tokenizer(tokenizer_path or model.hf_dir)
        modes = ("generate", "chat") if test_mode == "both" else (test_mode,)
        questions = [(mode, text) for mode in modes for text in prompt or _PROMPTS[mode]]
        encoded = [
            inference.encode(tokenizer, text, chat=mode == "chat", enable_thinking=enable_thinking)
            for mode, text in questions
        ]
        inference.check_prompts(model, encoded, generation["max_new_tokens"])
        network = inference.build_network(model, device_target)
    plan = load_network(network, model, use_training_conversion=use_training_conversion)
    loader = "MindFormers' training conversion" if use_training_conversion else "the bridge's loader"
    click.echo(f"converted   {plan.num_source_tensors} tensors to {len(plan.targets)} parameters, by {loader}")
    click.echo(f"loaded      {len(plan.targets)} of {len(network.parameters_dict())} parameters of the network")
    click.echo("values      no parameter is all zero, none holds NaN or infinities")
    for (mode, text), input_ids in zip(questions, encoded):
        answer = inference.generate_text(network, tokenizer, input_ids, **generation)
        click.echo(f"\n{mode:<11} {text}\n         -> {answer}")


@cli.command(
    "register-path",
    short_help="Print the folder for run_mindformer.py's --register_path.",
    epilog=examples("export REGISTER_PATH=$(mf-qwen3 register-path)"),
)
def register_path() -> None:
    """Print the folder for --register_path of run_mindformer.py (or REGISTER_PATH).

    The YAML names the bridge: auto_register: mf_qwen3.Bridge in model.model_config.
    """
    click.echo(_REGISTER_PATH)


@cli.command(
    short_help="Run one of MindFormers' scripts with the bridge's hooks.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples("mf-qwen3 launch run_mindformer.py --config predict_qwen3.yaml"),
)
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch(script: Path, arguments: tuple[str, ...]) -> None:
    """Run one of MindFormers' scripts with the bridge in place, its YAML as it is."""
    from mf_qwen3_bridge.mindformers.patching.patch import patch

    patch()
    os.environ.setdefault("REGISTER_PATH", str(_REGISTER_PATH))  # the YAML may name the bridge all the same
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))  # as python does
    runpy.run_path(str(script), run_name="__main__")


_PROMPTS = {
    "generate": ("Weights move from Hugging Face", "权重从 Hugging Face 到 MindFormers"),
    "chat": ("Who are you?", "你好，你是谁？"),
}


def main(arguments: list[str] | None = None, command: click.Command = cli) -> None:
    """Runs a command. Exit codes: 0 done, 1 unexpected, 2 the input is at fault."""
    try:
        command(arguments)
    except BridgeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in ("mindspore", "mindformers"):
            raise
        click.echo(f"Error: {error.name} is not installed: pip install 'mindformers>=1.7,<2'", err=True)
        sys.exit(2)
