"""Do config.json, the YAML and the tensors speak of the same model? Answered from headers, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.inputs.disagreements import disagreements, tensor_problems
from mf_qwen3_bridge.inputs.hf_config import normalise, read_hf_config
from mf_qwen3_bridge.inputs.identify import dialect_of, holds_experts, numbers_of, saved_by_ranks
from mf_qwen3_bridge.inputs.mindformers_yaml import (
    ADDITIONS,
    COMPUTED_NAMES,
    LAYOUT_FLAGS,
    OPTIONS,
    PARALLEL_SIZES,
    MindFormersYaml,
    read_mindformers_yaml,
    run_options,
)
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import WHOLE, ParallelConfig, Rank
from mf_qwen3_bridge.model.parameters import OUTPUT
from mf_qwen3_bridge.model.rules import INFER, Dialect, Rule, model_rules
from mf_qwen3_bridge.model.spec import MINDFORMERS_NAMES, ModelSpec
from mf_qwen3_bridge.transfer.plan import Plan, make_plan
from mf_qwen3_bridge.transfer.safetensors import Checkpoint, open_checkpoint, stale_files

# Of MindFormers' TransformerConfig and Qwen3Config (1.7 to 1.9).
_DEFAULT_SIZES = {"seq_length": 4096, "num_blocks": 1024, "block_size": 32}


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been found to be whole and to fit its config.

    Attributes:
        hf_dir: the directory with config.json and, as a rule, the tokenizer.
        spec: its numbers.
        hf_config: its normalised config.json.
        options: what the YAML and the caller say about the run: dtypes, cache blocks.
        checkpoint: its tensors.
        dialect: how they are named and laid out.
        rules: its table.
        parallel: how the run is spread over processes.
        training_layout: the layout of the training network, if the YAML says it.
        notes: what is unusual, but right.
    """

    hf_dir: Path
    spec: ModelSpec
    hf_config: dict[str, Any]
    options: dict[str, Any]
    checkpoint: Checkpoint
    dialect: Dialect
    rules: tuple[Rule, ...]
    parallel: ParallelConfig
    training_layout: Layout | None = None
    notes: tuple[str, ...] = ()

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and answer together: RoPE's positions, MindFormers' ``seq_length``, the KV cache."""
        scaling = self.hf_config["rope_scaling"]
        positions = self.hf_config["max_position_embeddings"]
        if scaling:
            positions = int(scaling["factor"] * scaling["original_max_position_embeddings"])
        sizes = _DEFAULT_SIZES | self.options
        return min(positions, sizes["seq_length"], sizes["num_blocks"] * sizes["block_size"])

    def plan(self, target: Dialect, dtype: str | None = None, rank: Rank = WHOLE) -> Plan:
        """The plan that turns the checkpoint, or a rank's part of it, into ``target``."""
        return make_plan(self.rules, self.checkpoint.tensors, self.dialect, target, dtype, rank)


def check(
    model_dir: Path,
    config: Path | MindFormersYaml | None = None,
    weights: Path | Checkpoint | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    hf_config: Mapping[str, Any] | None = None,
    default_layout: Layout | None = None,
    saved_by: int | None = None,
    tensor_parallel: int | None = None,
    expert_parallel: int | None = None,
    num_processes: int | None = None,
) -> Model:
    """Checks a checkpoint against its config, and both against a YAML.

    Args:
        model_dir: directory with config.json, and the weights unless ``weights`` says otherwise. It may hold weights
            alone if the YAML's ``pretrained_model_dir`` is the directory with config.json.
        config: a MindFormers YAML. What it says about the model must be so.
        weights: a directory or file with the weights, for weights that lie apart from config.json: those of a
            MindFormers training run, for example.
        overrides: entries of ``model.model_config`` that go before the YAML's.
        hf_config: a normalised config.json, for weights without one.
        default_layout: the layout of MindFormers weights when neither they nor the YAML say one.
        saved_by: how many tensor parallel ranks of a training run saved them, if that is known apart from the YAML.
        tensor_parallel: processes that share attention, MLP and vocabulary; else the YAML's, else ``num_processes``.
        expert_parallel: processes that share the experts; else the YAML's, else 1.
        num_processes: how many run; left out when none does yet.

    Raises:
        BridgeError: with a table of everything that does not fit, and what to change.
    """
    yaml = read_mindformers_yaml(config) if isinstance(config, Path) else config or MindFormersYaml()
    hf_dir = model_dir
    if (
        hf_config is None
        and yaml.pretrained_model_dir
        and model_dir.is_dir()
        and not (model_dir / "config.json").is_file()
    ):
        hf_dir, weights = yaml.pretrained_model_dir, weights or model_dir
    arguments = dict(overrides or {})
    said = yaml.model_config | arguments
    additions = {key: said[key] for key in ADDITIONS if key in said}
    hf_config = dict(hf_config) if hf_config is not None else read_hf_config(hf_dir, additions)
    checkpoint = weights if isinstance(weights, Checkpoint) else open_checkpoint(weights or model_dir)
    layout = yaml.layout_of_weights(holds_experts(checkpoint), saved_by or saved_by_ranks(checkpoint))
    dialect = dialect_of(checkpoint, layout, yaml.origin, default_layout)
    spec = ModelSpec.from_model_config(hf_config)
    options, run_problems = run_options(({} if yaml.is_for_training else yaml.model_config) | arguments)
    run_problems += _unknown_arguments(arguments)
    named = {"tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel}
    parallel, parallel_problems = _parallel(yaml, named, num_processes)
    run_problems += [*parallel_problems, *parallel.problems(spec), *_block_problems(dialect, parallel)]
    sides = {yaml.origin: yaml.model_config, "arguments": arguments}
    in_tensors = numbers_of(checkpoint.tensors, dialect)
    has_experts = holds_experts(checkpoint)
    if has_experts != spec.is_moe:
        raise BridgeError(f"config and weights of {model_dir} are of two models", [_other_kind(hf_config, has_experts)])
    trained_with = yaml.origin if yaml.is_for_training else None
    problems = [*disagreements(spec, hf_config, sides, in_tensors, trained_with)]
    problems += tensor_problems(spec, checkpoint, dialect, in_tensors)
    if problems:
        raise BridgeError(
            f"config and weights of {model_dir} don't fit: take both from one model, or change what the table says",
            problems + run_problems,
        )
    if run_problems:
        raise BridgeError(f"{model_dir} can't be run like this", run_problems)
    rules, notes = tuple(model_rules(spec)), tuple(notes_on(checkpoint, hf_dir, yaml))
    return Model(hf_dir, spec, hf_config, options, checkpoint, dialect, rules, parallel, layout, notes)


def first_layers(model: Model, num_layers: int) -> Model:
    """The same model with its first layers only.

    Raises:
        BridgeError: it has not so many layers.
    """
    if num_layers > model.spec.num_layers:
        raise BridgeError(f"{model.checkpoint.path} has {model.spec.num_layers} layers")
    spec = replace(model.spec, num_layers=num_layers)
    rules = tuple(model_rules(spec))
    kept = {place.tensor for rule in rules for place in rule.places(model.dialect)}
    kept.add(model.dialect.name(OUTPUT))  # if it is stored although it is tied, so it stays
    tensors = {name: tensor for name, tensor in model.checkpoint.tensors.items() if name in kept}
    return replace(
        model,
        spec=spec,
        hf_config=model.hf_config and model.hf_config | {"num_hidden_layers": num_layers},
        checkpoint=replace(model.checkpoint, tensors=tensors),
        rules=rules,
    )


def check_weights(weights: Path, model_config: Mapping[str, Any], origin: str = "model.model_config") -> Model:
    """Checks weights against what a network was built from, and against the config.json that lies beside them.

    Args:
        weights: a directory or file, in any dialect.
        model_config: the network's numbers and what it computes with, under any of MindFormers' names.
        origin: a name for it, for messages.

    Raises:
        BridgeError: with a table of everything that does not fit, and what to change.
    """
    known = _NAMES | LAYOUT_FLAGS
    yaml = MindFormersYaml(
        origin, {key: value for key, value in model_config.items() if key in known and value is not None}
    )
    if (weights / "config.json").is_file():
        return check(weights, yaml)
    try:
        spec = ModelSpec.from_model_config(yaml.model_config)
    except KeyError as missing:
        raise BridgeError(f"{origin} does not say {missing.args[0]}") from None
    raw, _ = yaml.hf_config(spec)
    return check(weights, yaml, hf_config=normalise(raw, origin))


def _block_problems(dialect: Dialect, parallel: ParallelConfig) -> Iterator[Problem]:
    if dialect.layout and dialect.layout.tensor_parallel > 1 and parallel.world_size > 1:
        yield Problem(
            "layout",
            f"contiguous in {dialect.layout.tensor_parallel} blocks, those of the training run's tensor parallel ranks",
            "only one process can load it so; for several, export it to Hugging Face first (mf-qwen3 export)",
        )


def _parallel(
    yaml: MindFormersYaml, named: Mapping[str, int | None], num_processes: int | None
) -> tuple[ParallelConfig, list[Problem]]:
    """The sizes that the caller names and those of an inference YAML, which must not contradict each other."""
    sizes, problems = yaml.parallel_sizes()
    for field, value in named.items():
        if value is not None and sizes.setdefault(field, value) != value:
            found = f"arguments: {value}\n{yaml.origin}: {sizes[field]}"
            problems.append(Problem(field.replace("_", " "), found, "leave out the argument, or change the YAML"))
    sizes.setdefault("tensor_parallel", num_processes or 1)
    if num_processes not in (None, sizes["tensor_parallel"]) and not problems:
        size = sizes["tensor_parallel"]
        remedy = f"start {size} processes: msrun --worker_num={size} --local_worker_num={size} --join=True ..."
        problems.append(Problem("tensor parallel", f"{size}, number of processes {num_processes}", remedy))
    return ParallelConfig(**sizes), problems


def notes_on(checkpoint: Checkpoint, hf_dir: Path, yaml: MindFormersYaml) -> Iterator[str]:
    """What is unusual about a checkpoint and a YAML, but right."""
    if (hf_dir / "config.json").is_file() and not (hf_dir / "generation_config.json").is_file():
        yield "no generation_config.json: a text ends at config.json's eos_token_id only"
    if "rope_scaling" in yaml.model_config:
        yield f"rope_scaling of {yaml.origin} goes before config.json's"
    for file in stale_files(checkpoint):
        yield f"{file.name} is not read: the index does not name it"
    unused = sorted(yaml.model_config.keys() - OPTIONS - _NAMES - LAYOUT_FLAGS - {"auto_register"})
    if unused and not yaml.is_for_training:
        yield f"not used: {', '.join(unused)} of {yaml.origin}"
    sizes = yaml.section("parallel_config")
    is_parallel = yaml.is_for_training or yaml.document.get("use_parallel")
    if not is_parallel and any(sizes.get(key) not in (None, 1) for key in PARALLEL_SIZES):
        yield f"parallel_config of {yaml.origin} is not used: use_parallel is not True"
    for key, used in (("pretrained_model_dir", hf_dir), ("load_checkpoint", checkpoint.path)):
        named = yaml.named_path(key)
        if named and named.resolve() != used.resolve():
            yield f"{yaml.origin} names {key} {named}; used is {used}"


def _other_kind(hf_config: Mapping[str, Any], has_experts: bool) -> Problem:
    weights = "experts (Qwen3-MoE)" if has_experts else "no experts (dense Qwen3)"
    found = f"config.json: {hf_config['model_type']}\nweights: {weights}"
    return Problem("model_type", found, "use the config.json that belongs to the weights")


# All that MindFormers calls what config.json says too.
_NAMES = {key for keys in MINDFORMERS_NAMES.values() for key in keys} | ADDITIONS
_NAMES |= {key for name, aliases in COMPUTED_NAMES.items() for key in (name, *aliases)}


def _unknown_arguments(overrides: Mapping[str, Any]) -> Iterator[Problem]:
    for key in sorted(overrides.keys() - _NAMES - OPTIONS):
        yield Problem(key, "not an option of a run", f"known are {', '.join(sorted(OPTIONS))}")


def summary(model: Model) -> Iterator[str]:
    """What was found, line by line, for a person."""
    spec, checkpoint = model.spec, model.checkpoint
    tied = "tied" if spec.tie_word_embeddings else "untied"
    kind, mlp = "Qwen3", f"ffn_hidden_size {spec.ffn_hidden_size}"
    if spec.is_moe:
        kind, mlp = "Qwen3-MoE", f"{spec.num_experts} experts of moe_ffn_hidden_size {spec.moe_ffn_hidden_size}"
    dtypes = ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))
    files = len({tensor.file for tensor in checkpoint.tensors.values()})
    plan = model.plan(INFER)
    yield (
        f"model       {kind}, {spec.num_layers} layers, hidden_size {spec.hidden_size}, "
        f"{spec.num_attention_heads} heads and {spec.num_query_groups} KV heads of {spec.head_dim}, "
        f"{mlp}, vocab_size {spec.vocab_size}, {tied} embeddings"
    )
    yield (
        f"checkpoint  {model.dialect}, {len(checkpoint.tensors)} tensors, {checkpoint.nbytes / 2**20:.1f} MiB "
        f"({dtypes}) in {files} {'file' if files == 1 else 'files'}"
    )
    yield f"plan        {plan.num_source_tensors} tensors become {len(plan.targets)} MindFormers parameters"
    if model.parallel.world_size > 1:
        share = model.plan(INFER, rank=model.parallel.rank(0)).source_nbytes
        yield (
            f"parallel    {model.parallel.world_size} processes (tensor parallel {model.parallel.tensor_parallel}, "
            f"expert parallel {model.parallel.expert_parallel}), each holds {share / 2**20:.1f} MiB"
        )
    yield from (f"note        {note}" for note in model.notes)
    if plan.ignored:
        yield f"note        {len(plan.ignored)} tensors are state of a training run and are left out"
    yield "result      config and weights fit"
