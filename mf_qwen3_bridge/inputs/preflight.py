"""Checks a checkpoint against config.json, YAML and arguments, by headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs import mindformers_config
from mf_qwen3_bridge.inputs.adapter_files import AdapterPath, adapter_paths
from mf_qwen3_bridge.inputs.adapters import adapter_notes, with_adapters
from mf_qwen3_bridge.inputs.disagreements import (
    Sides,
    block_problems,
    computed_rows,
    declared_by,
    match_model,
    number_rows,
)
from mf_qwen3_bridge.inputs.hf_config import config_notes, normalise, read_hf_config, read_json
from mf_qwen3_bridge.inputs.identify import Weights, dialect_of, incomplete, numbers_of, refuse_lora, spec_of
from mf_qwen3_bridge.inputs.mindformers_config import ADAPTER_KEY, MindFormersConfig, read_mindformers_config
from mf_qwen3_bridge.inputs.opening import config_beside, open_source, stale_files
from mf_qwen3_bridge.inputs.quantised import dequantised
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT, Layout
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import Dialect
from mf_qwen3_bridge.model.spec import ModelSpec

# Of MindFormers' TransformerConfig and Qwen3Config (1.7 to 2.1).
_DEFAULT_SIZES = {"seq_length": 4096, "num_blocks": 1024, "block_size": 32}


@dataclass(frozen=True)
class CheckedCheckpoint(Weights):
    """Weights that are complete, and fit everything that is declared of them.

    Attributes:
        hf_dir: the directory with config.json and, as a rule, the tokenizer.
        hf_config: the normalised config.json; empty if nothing declares all of what one holds.
        options: what YAML and caller declare of the run: dtypes, sizes of the KV cache.
        yaml_layout: the layout of the training network, if the YAML declares it.
        layout_is_declared: whether files or YAML declare the layout of MindFormers weights; else it is assumed.
        ignored, notes: names of tensors that are state of a training run; what is unusual, but right.
    """

    hf_dir: Path
    hf_config: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    yaml_layout: Layout | None = None
    layout_is_declared: bool = True
    ignored: tuple[str, ...] = ()
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

    def first_layers(self, num_layers: int) -> CheckedCheckpoint:
        """See :meth:`Weights.first_layers`; config.json has as many."""
        smaller = super().first_layers(num_layers)
        assert isinstance(smaller, CheckedCheckpoint)
        return replace(smaller, hf_config=self.hf_config and self.hf_config | {"num_hidden_layers": num_layers})


def check(
    model_dir: Path,
    config: Path | MindFormersConfig | None = None,
    weights: Path | Source | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    adapters: Any = None,
    tensor_parallel: int | None = None,
    expert_parallel: int | None = None,
    num_processes: int | None = None,
) -> CheckedCheckpoint:
    """Checks the weights of a Hugging Face directory, or others, against its config.json and a YAML.

    Args:
        model_dir: directory with config.json, and the weights unless ``weights`` names others. It may hold weights
            alone if the YAML's ``pretrained_model_dir`` is the directory with config.json.
        config: a MindFormers YAML. What it declares about the model must be so.
        weights: a directory or file with the weights, when they are not beside config.json: those of a MindFormers
            training run, for example.
        overrides: entries of ``model.model_config`` that replace the YAML's.
        adapters: PEFT adapters to add to Hugging Face weights, as :func:`adapter_paths` takes them; else the YAML's
            ``pretrained_adapter_dir``.
        tensor_parallel: processes that share attention, MLP and vocabulary; else the YAML's, else ``num_processes``.
        expert_parallel: processes that share the experts; else the YAML's, else 1.
        num_processes: how many run; left out when none does yet.

    Raises:
        BridgeError: with a table of everything that does not fit, and what to change.
    """
    yaml = config if isinstance(config, MindFormersConfig) else read_mindformers_config(config)
    hf_dir, named = model_dir, yaml.named_path("pretrained_model_dir")
    if named and model_dir.is_dir() and not (model_dir / "config.json").is_file():
        hf_dir, weights = named, weights or model_dir
    arguments = dict(overrides or {})
    hf_config = read_hf_config(hf_dir, _additions(yaml, arguments))
    source = weights if isinstance(weights, Source) else open_source(weights or model_dir)
    sizes = {"tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel}
    paths = adapter_paths(adapters) or adapter_paths(yaml.model_config.get(ADAPTER_KEY) or None)
    return _check(source, hf_dir, hf_config, yaml, arguments, sizes, num_processes, adapters=paths)


def check_trained(
    source: Source,
    hf_config: Path | None = None,
    config: Path | None = None,
    numbers: Mapping[str, Any] | None = None,
    model_parallel: int | None = None,
    *,
    adapters: Any = None,
) -> CheckedCheckpoint:
    """Checks what a MindFormers training run saved against everything that is declared about the model.

    Args:
        hf_config: a Hugging Face directory with the model's config.json; else that of the YAML's
            ``pretrained_model_dir``, or one beside the weights, if there is one. Without any, the tensors' shapes show
            the model's numbers.
        config: the YAML of the training run.
        numbers: what the caller declares, under any of MindFormers' names; layout flags as well.
        model_parallel: over how many tensor parallel ranks the run was spread, if the caller knows it.
        adapters: as for :func:`check`, if these are Hugging Face's weights.

    Raises:
        BridgeError: with a table of everything that does not fit, and what to change.
    """
    yaml = read_mindformers_config(config)
    arguments = dict(numbers or {})
    hf_dir = hf_config or _named_hf_dir(source, yaml)
    declared = read_hf_config(hf_dir, _additions(yaml, arguments)) if hf_dir else None
    layout = _layout_of_arguments(source, yaml, arguments, model_parallel)
    paths = adapter_paths(adapters)
    return _check(
        source, hf_dir, declared, yaml, arguments, default_layout=TRAINING_DEFAULT, layout=layout, adapters=paths
    )


def check_for_adapter(
    source: Source,
    hf_config: Path | None = None,
    config: Path | None = None,
    numbers: Mapping[str, Any] | None = None,
    model_parallel: int | None = None,
) -> CheckedCheckpoint:
    """Checks what is declared about the model that an adapter is for, of which ``source`` holds no weights.

    The model is that of the Hugging Face directory, whose weights are not opened. Args, Raises: see
    :func:`check_trained`.
    """
    yaml = read_mindformers_config(config)
    arguments = dict(numbers or {})
    hf_dir = hf_config or _named_hf_dir(source, yaml)
    if hf_dir is None:
        raise BridgeError(f"{source.path} holds an adapter alone: name its base model with --hf_config")
    declared = read_hf_config(hf_dir, _additions(yaml, arguments))
    spec = ModelSpec.from_model_config(declared)
    layout = _layout_of_arguments(source, yaml, arguments, model_parallel)
    dialect = dialect_of(source, layout, yaml.origin, TRAINING_DEFAULT)
    if spec.is_moe and dialect.layout:
        dialect = replace(dialect, layout=dialect.layout.of_experts)
    sides = {yaml.origin: yaml.model_config, "arguments": arguments}
    problems = [*number_rows(spec, ["config.json"], sides, {}), *block_problems(spec, dialect)]
    problems += computed_rows(declared, ["config.json"], sides, yaml.origin if yaml.is_for_training else None)
    refuse(f"config.json of {hf_dir} contradicts what was declared: change what the table says", problems)
    is_declared = bool(source.declared_layout or layout)
    return CheckedCheckpoint(source, dialect, spec, hf_dir, declared, layout_is_declared=is_declared)


def _named_hf_dir(source: Source, yaml: MindFormersConfig) -> Path | None:
    """The YAML's Hugging Face directory, or the one that the weights are in."""
    candidates = (yaml.named_path("pretrained_model_dir"), source.directory)
    return next((path for path in candidates if path and (path / "config.json").is_file()), None)


def check_against_config(
    weights: Path, model_config: Mapping[str, Any], origin: str, adapters: Any = None
) -> CheckedCheckpoint:
    """Checks weights against the config that a network was built from, and against a config.json beside them.

    ``model_config`` has the network's numbers and what it computes with, under any of MindFormers' names; ``origin`` is
    its name in messages; ``adapters`` as for :func:`check`. Raises as :func:`check`.
    """
    known = mindformers_config.MODEL_KEYS
    declared = {key: value for key, value in model_config.items() if key in known and value is not None}
    yaml = MindFormersConfig(origin, declared)
    if (weights / "config.json").is_file():
        return check(weights, yaml, adapters=adapters)
    named = model_config.get("pretrained_model_dir")
    described = dequantised(open_source(weights), _config_in(Path(named) if isinstance(named, str) else None))
    return _check(described, None, None, yaml, {}, adapters=adapter_paths(adapters))


def _config_in(directory: Path | None) -> dict[str, Any]:
    """The config.json in a directory, as it is; empty if there is none."""
    file = directory / "config.json" if directory else None
    return read_json(file) if file and file.is_file() else {}


def _additions(yaml: MindFormersConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What YAML and arguments add to config.json."""
    declared = yaml.model_config | dict(arguments)
    return {key: declared[key] for key in mindformers_config.ADDITIONS if key in declared}


def _check(
    source: Source,
    hf_dir: Path | None,
    hf_config: dict[str, Any] | None,
    yaml: MindFormersConfig,
    arguments: Mapping[str, Any],
    sizes: Mapping[str, int | None] | None = None,
    num_processes: int | None = None,
    *,
    layout: Layout | None = None,
    default_layout: Layout | None = None,
    adapters: Sequence[AdapterPath] = (),
) -> CheckedCheckpoint:
    """Holds everything that is declared against the tensors and against each other; see the functions above."""
    source = dequantised(source, config_beside(source) or _config_in(hf_dir))
    refuse_lora(source)
    _check_kind(source, hf_config, yaml, arguments)
    sides = {yaml.origin: yaml.model_config, "arguments": dict(arguments)}
    layout = layout or yaml.layout_of_weights(source.has_experts, source.tensor_parallel)
    dialect = dialect_of(source, layout, yaml.origin, default_layout)
    spec = _spec_of(source, dialect, hf_config, sides)
    in_tensors = numbers_of(source.tensors, dialect)
    of_run = ({} if yaml.is_for_training else yaml.model_config) | dict(arguments)
    options, run_problems = mindformers_config.run_options(of_run)
    known = ", ".join(sorted(mindformers_config.OPTIONS))
    for key in sorted(arguments.keys() - mindformers_config.OPTIONS - mindformers_config.MODEL_KEYS):
        run_problems.append(Problem(key, "not an option of a run", f"known are {known}"))
    parallel = _parallel(yaml, sizes or {}, num_processes, run_problems)
    run_problems += [*parallel.problems(spec), *_block_problems(dialect, parallel)]
    if yaml.is_for_training and yaml.model_config.get(ADAPTER_KEY):
        run_problems.append(Problem(ADAPTER_KEY, f"in {yaml.origin}, for training", "it is for run_mode: predict"))
    origins = ["config.json"] if hf_config is not None else []
    absent: list[str] = []
    if hf_config is None:
        raw, absent = yaml.hf_config(spec)
        hf_config = normalise(raw, yaml.origin) if not absent else {}
    problems = list(number_rows(spec, origins, sides, in_tensors))
    if hf_config:
        problems += computed_rows(hf_config, origins, sides, yaml.origin if yaml.is_for_training else None)
    match = match_model(spec, source.tensors, dialect, in_tensors)
    problems += match.problems
    if problems:
        at = source.path
        headline = f"config and weights of {at} don't fit: take both from one model, or change what the table says"
        if not origins:
            headline = f"{at} contradicts what was declared: change what the table says"
        raise BridgeError(headline, problems + run_problems)
    refuse(f"{source.path} can't be run with these settings", run_problems)
    adapted = with_adapters(source, adapters, spec.tie_word_embeddings)
    notes = list(config_notes(hf_dir, hf_config, _additions(yaml, arguments)) if hf_dir else ())
    notes += _notes(source, hf_dir or source.directory, yaml)
    notes += adapter_notes(adapted.adapters)
    if adapters and (named := yaml.model_config.get(ADAPTER_KEY)) and adapter_paths(named) != tuple(adapters):
        notes.append(f"{ADAPTER_KEY} of {yaml.origin} is not used: other adapters are named")
    if absent and yaml.model_config:
        notes.append(f"{yaml.origin} does not declare {', '.join(absent)}")
    hf_dir, declared = hf_dir or source.directory, bool(dialect.is_hf or source.declared_layout or layout)
    return CheckedCheckpoint(
        adapted, dialect, spec, hf_dir, hf_config, options, parallel, layout, declared, match.ignored, tuple(notes)
    )


def _layout_of_arguments(
    source: Source, yaml: MindFormersConfig, arguments: Mapping[str, Any], model_parallel: int | None
) -> Layout | None:
    """The layout that the caller's flags ask for; what they leave out is the YAML's, or MindFormers' default."""
    known_size = source.tensor_parallel or model_parallel
    configured = yaml.layout_of_weights(source.has_experts, known_size)
    flags, declared = map(mindformers_config.declared_flags, (arguments, yaml.model_config))
    if not flags:
        return configured
    size = known_size or yaml.parallel_sizes(training=True).get("tensor_parallel", 1)
    layout, other = Layout.of_training(declared | flags, size), Layout.of_training(flags | declared, size)
    if source.has_experts:
        layout, other = layout.of_experts, other.of_experts
    other = configured or other  # a predict YAML may declare one flag only, or not the size of the training run
    if layout != other:
        found = f"arguments: {layout}\n{yaml.origin}: {other}"
        raise BridgeError("arguments and YAML contradict each other", [Problem("layout", found, "leave out one")])
    return layout


def _check_kind(
    source: Source, hf_config: Mapping[str, Any] | None, yaml: MindFormersConfig, arguments: Mapping[str, Any]
) -> None:
    """Are weights and declarations of one kind of model, dense or with experts?"""
    kind, other = ("qwen3_moe", "ffn_hidden_size") if source.has_experts else ("qwen3", "moe_ffn_hidden_size")
    found = "experts (Qwen3-MoE)" if source.has_experts else "no experts (dense Qwen3)"
    problems = []
    if hf_config and bool(hf_config.get("num_experts")) != source.has_experts:
        remedy = "use the config.json that belongs to the weights"
        problems.append(Problem("model_type", f"config.json: {hf_config['model_type']}\nweights: {found}", remedy))
    declared = yaml.model_config.get("model_type")
    if declared in ("qwen3", "qwen3_moe") and declared != kind:
        remedy = "give the YAML that the weights were trained with"
        problems.append(Problem("model_type", f"{yaml.origin}: {declared}\nweights: {kind}", remedy))
    if other in arguments:
        problems.append(Problem(other, str(arguments[other]), f"a {kind} model has none: leave it out"))
    refuse(f"{source.path} is of another kind of model than declared", problems)


def _spec_of(source: Source, dialect: Dialect, hf_config: Mapping[str, Any] | None, sides: Sides) -> ModelSpec:
    """The model by its config.json; without one by the tensors' shapes or, where these are damaged, by the sides."""
    if hf_config is not None:
        return ModelSpec.from_model_config(hf_config)
    tied = [value for _, _, value in declared_by(sides, ("tie_word_embeddings",))]
    try:
        return spec_of(source.tensors, dialect, all(value in (True,) for value in tied) if tied else None)
    except KeyError as missing:
        try:
            return ModelSpec.from_model_config({key: value for side in sides.values() for key, value in side.items()})
        except KeyError:
            raise incomplete(source, missing) from None


def _block_problems(dialect: Dialect, parallel: ParallelConfig) -> Iterator[Problem]:
    if dialect.layout and dialect.layout.tensor_parallel > 1 and parallel.world_size > 1:
        found = f"contiguous in the blocks of the training run's {dialect.layout.tensor_parallel} tensor parallel ranks"
        remedy = "only one process can load it so; for several, export it to Hugging Face first (mf-qwen3 export)"
        yield Problem("layout", found, remedy)


def _parallel(
    yaml: MindFormersConfig, named: Mapping[str, int | None], num_processes: int | None, problems: list[Problem]
) -> ParallelConfig:
    """The sizes that the caller names and those of an inference YAML; adds to ``problems`` where they contradict."""
    found = list(yaml.parallel_problems())
    sizes = yaml.parallel_sizes(training=False)
    for name, value in named.items():
        if value is not None and sizes.setdefault(name, value) != value:
            both = f"arguments: {value}\n{yaml.origin}: {sizes[name]}"
            found.append(Problem(name.replace("_", " "), both, "leave out the argument, or change the YAML"))
    size = sizes.setdefault("tensor_parallel", num_processes or 1)
    if num_processes not in (None, size) and not found:
        remedy = f"start {size} processes: msrun --worker_num={size} --local_worker_num={size} --join=True ..."
        found.append(Problem("tensor parallel", f"{size}, number of processes {num_processes}", remedy))
    problems += found
    return ParallelConfig(**sizes)


def _notes(source: Source, hf_dir: Path, yaml: MindFormersConfig) -> Iterator[str]:
    """What is unusual about a checkpoint and a YAML, but right."""
    if (hf_dir / "config.json").is_file() and not (hf_dir / "generation_config.json").is_file():
        yield "no generation_config.json: a text ends at config.json's eos_token_id only"
    if "rope_scaling" in yaml.model_config:
        yield f"rope_scaling of {yaml.origin} goes before config.json's"
    for file in stale_files(source):
        yield f"{file.name} is not read: the index does not name it"
    unused = (
        yaml.model_config.keys()
        - mindformers_config.OPTIONS
        - mindformers_config.MODEL_KEYS
        - {"auto_register", ADAPTER_KEY}
    )
    if unused and not yaml.is_for_training:
        yield f"not used: {', '.join(sorted(unused))} of {yaml.origin}"
    sizes = yaml.section("parallel_config")
    is_parallel = yaml.is_for_training or yaml.document.get("use_parallel")
    if not is_parallel and any(sizes.get(key) not in (None, 1) for key in mindformers_config.PARALLEL_SIZES):
        yield f"parallel_config of {yaml.origin} is not used: use_parallel is not True"
    for key, used in (("pretrained_model_dir", hf_dir), ("load_checkpoint", source.path)):
        named = yaml.named_path(key)
        if named and named.resolve() != used.resolve():
            yield f"{yaml.origin} names {key} {named}; used is {used}"
