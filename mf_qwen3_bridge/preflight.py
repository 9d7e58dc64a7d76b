"""Do config.json, the YAML and the tensors speak of the same model? Answered from headers, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.checkpoint import Checkpoint, TensorInfo, open_checkpoint, stale_files
from mf_qwen3_bridge.config import MindFormersConfig, read_hf_config, read_mindformers_config
from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.layouts import Layout
from mf_qwen3_bridge.plan import Plan, make_plan
from mf_qwen3_bridge.rules import HF, INFER, Dialect, Rule, dense_rules
from mf_qwen3_bridge.spec import COMPUTED, HF_NAME, MINDFORMERS_NAMES, RUN_OPTIONS, ModelSpec, numbers_in

# Every file that the bridge writes says in its metadata how its fused parameters lie.
LAYOUT_STAMP = "mf_qwen3_bridge.layout"
# Of MindFormers' TransformerConfig (1.7 to 1.9).
DEFAULT_SEQ_LENGTH = 4096


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
        notes: what is unusual, but right.
    """

    hf_dir: Path
    spec: ModelSpec
    hf_config: dict[str, Any]
    options: dict[str, Any]
    checkpoint: Checkpoint
    dialect: Dialect
    rules: tuple[Rule, ...]
    notes: tuple[str, ...] = ()

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and answer together: the positions RoPE has, and MindFormers' ``seq_length``."""
        scaling = self.hf_config["rope_scaling"]
        positions = self.hf_config["max_position_embeddings"]
        if scaling:
            positions = int(scaling["factor"] * scaling["original_max_position_embeddings"])
        return min(positions, self.options.get("seq_length", DEFAULT_SEQ_LENGTH))

    def plan(self, target: Dialect, dtype: str | None = None) -> Plan:
        """The plan that turns the checkpoint into ``target``."""
        return make_plan(self.rules, self.checkpoint.tensors, self.dialect, target, dtype)


# What a YAML may add to config.json: YaRN is asked for so.
_ADDITIONS = ("rope_scaling", "max_position_embeddings")


def check(
    model_dir: Path,
    config: Path | None = None,
    weights: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Model:
    """Checks a checkpoint against its config, and both against a YAML.

    Args:
        model_dir: directory with config.json, and the weights unless ``weights`` says otherwise. It may hold weights
            alone if the YAML's ``pretrained_model_dir`` is the directory with config.json.
        config: a MindFormers YAML. What it says about the model must be so.
        weights: a directory or file with the weights, for weights that lie apart from config.json: those of a
            MindFormers training run, for example.
        overrides: entries of ``model.model_config`` that go before the YAML's.

    Raises:
        BridgeError: with a table of everything that does not fit, and what to change.
    """
    yaml = read_mindformers_config(config) if config else MindFormersConfig()
    hf_dir = model_dir
    if yaml.pretrained_model_dir and model_dir.is_dir() and not (model_dir / "config.json").is_file():
        hf_dir, weights = yaml.pretrained_model_dir, weights or model_dir
    wanted = ({} if yaml.is_for_training else yaml.model_config) | dict(overrides or {})
    hf_config = read_hf_config(hf_dir, {key: wanted[key] for key in _ADDITIONS if wanted.get(key) is not None})
    checkpoint = open_checkpoint(weights or model_dir)
    dialect = recognise(checkpoint, yaml)
    spec = ModelSpec.from_hf(hf_config)
    rules = tuple(dense_rules(spec))
    sides = {yaml.origin: yaml.model_config, "arguments": overrides or {}}
    problems = [
        *_contradictions(spec, sides, checkpoint.tensors, dialect),
        *_other_computation(hf_config, sides),
        *_unknown_arguments(overrides or {}),
    ]
    try:
        make_plan(rules, checkpoint.tensors, dialect, dialect)
    except BridgeError as error:
        # A wrong number in the config makes many tensors look wrong: say it once.
        problems += _unexplained(error, spec, checkpoint.tensors, dialect)
    if problems:
        raise BridgeError(
            f"config and weights of {model_dir} don't fit: take both from one model, or change what the table says",
            problems,
        )
    options = {key: value for key, value in wanted.items() if key in RUN_OPTIONS}
    unused = sorted(key for key in wanted if key not in RUN_OPTIONS | _KNOWN)
    notes = [
        f"{file.name} is not part of the checkpoint: the index does not name it" for file in stale_files(checkpoint)
    ]
    notes += [f"not used: {', '.join(unused)} of {yaml.origin}"] if unused else []
    return Model(hf_dir, spec, hf_config, options, checkpoint, dialect, rules, tuple(notes))


def recognise(checkpoint: Checkpoint, yaml: MindFormersConfig) -> Dialect:
    """Whose names the tensors bear and, for MindFormers', in which layout they lie.

    The layout is known from the stamp that the bridge leaves in its files, or from the training YAML.

    Raises:
        BridgeError: the names are nobody's, or the layout is not known, or stamp and YAML contradict each other.
    """
    names = checkpoint.tensors
    if any(name.startswith(("model.layers.", "model.embed_tokens.")) for name in names):
        return HF
    if not any(name.startswith(("decoder.", "embedding.")) for name in names):
        some = ", ".join(sorted(names)[:3])
        raise BridgeError(f"{checkpoint.path}: the tensors' names are neither Hugging Face's nor MindFormers' ({some})")
    stamp = checkpoint.metadata.get(LAYOUT_STAMP)
    stamped = Layout.parse(stamp) if stamp else None
    configured = yaml.training_layout
    if stamped and configured and stamped != configured:
        raise BridgeError(
            "the layouts of QKV and gate/up contradict each other",
            [
                Problem(
                    "layout", f"files: {stamped}\n{yaml.origin}: {configured}", f"in the YAML: {stamped.training_flags}"
                )
            ],
        )
    layout = stamped or configured
    if layout is None:
        raise BridgeError(
            f"{checkpoint.path} holds MindFormers weights, but nothing says how QKV and gate/up lie in them, and the "
            "wrong guess would load without an error and compute garbage: give the YAML they were trained with "
            "(--config), whose use_contiguous_weight_layout_attention and use_interleaved_weight_layout_mlp say it"
        )
    return Dialect(layout)


def numbers_of(tensors: Mapping[str, TensorInfo], dialect: Dialect) -> dict[str, tuple[int, str]]:
    """What the tensors' shapes say about a ModelSpec's fields.

    Returns:
        {field: (number, the tensor that says so)}; only fields that can be told.
    """
    layers = {int(match.group(1)) for name in tensors if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if not layers:
        return {}
    first = min(layers)
    hf_prefix, mf_prefix = f"model.layers.{first}", f"decoder.layers.{first}"
    found: dict[str, tuple[int, str]] = {"num_layers": (max(layers) + 1, f"layers.{max(layers)}")}

    def read(field: str, name: str, axis: int, unit: int = 1) -> None:
        tensor = tensors.get(name)
        if tensor and len(tensor.shape) > axis and tensor.shape[axis] % unit == 0:
            found[field] = (tensor.shape[axis] // unit, f"{name} {tensor.shape}")

    embedding = "model.embed_tokens.weight" if dialect.is_hf else "embedding.word_embeddings.weight"
    read("vocab_size", embedding, 0)
    read("hidden_size", embedding, 1)
    if dialect.is_hf:
        read("ffn_hidden_size", f"{hf_prefix}.mlp.gate_proj.weight", 0)
        read("head_dim", f"{hf_prefix}.self_attn.q_norm.weight", 0)
        head_dim = found.get("head_dim", (1, ""))[0]
        read("num_attention_heads", f"{hf_prefix}.self_attn.q_proj.weight", 0, head_dim)
        read("num_query_groups", f"{hf_prefix}.self_attn.k_proj.weight", 0, head_dim)
    else:
        read("ffn_hidden_size", f"{mf_prefix}.mlp.linear_fc2.weight", 1)
        read("head_dim", f"{mf_prefix}.self_attention.q_layernorm.weight", 0)
        head_dim = found.get("head_dim", (1, ""))[0]
        read("num_attention_heads", f"{mf_prefix}.self_attention.linear_proj.weight", 1, head_dim)
        qkv = tensors.get(f"{mf_prefix}.self_attention.linear_qkv.weight")
        if qkv and "num_attention_heads" in found:
            key_value = qkv.shape[0] // head_dim - found["num_attention_heads"][0]
            found["num_query_groups"] = (key_value // 2, f"{qkv.name} {qkv.shape}")
    return found


def _contradictions(
    spec: ModelSpec, sides: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, TensorInfo], dialect: Dialect
) -> list[Problem]:
    """A row for each number on which config.json, the other ``sides`` and the tensors do not agree."""
    in_tensors = numbers_of(tensors, dialect)
    in_sides = {side: numbers_in(model_config) for side, model_config in sides.items()}
    problems = []
    for field, hf_name in HF_NAME.items():
        said: dict[str, tuple[str, Any]] = {"config.json": (hf_name, getattr(spec, field))}
        said |= {side: numbers[field] for side, numbers in in_sides.items() if field in numbers}
        truth = in_tensors.get(field, (getattr(spec, field), ""))[0]
        wrong = {side: key for side, (key, value) in said.items() if value != truth}
        if not wrong:
            continue
        lines = [f"{side}: {value}" for side, (_, value) in said.items()]
        if field in in_tensors:
            lines.append("weights: {} ({})".format(*in_tensors[field]))
        remedy = " and ".join(f"set {key} to {truth} in {side}" for side, key in wrong.items())
        problems.append(Problem(hf_name, "\n".join(lines), remedy))
    return problems


def _other_computation(hf_config: Mapping[str, Any], sides: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """What the other ``sides`` would have computed otherwise than config.json says."""
    for name, aliases in COMPUTED.items():
        for side, model_config in sides.items():
            for key in (name, *aliases):
                value = model_config.get(key)
                if value is not None and not _same(value, hf_config[name]):
                    found = f"config.json: {hf_config[name]}\n{side}: {value}"
                    yield Problem(name, found, f"set {key} to {hf_config[name]} in {side}, or leave it out")


def _same(left: Any, right: Any) -> bool:
    try:
        return float(left) == float(right)  # YAML takes 1e-6 for a string
    except (TypeError, ValueError):
        return bool(left == right)


_KNOWN = {key for keys in MINDFORMERS_NAMES.values() for key in keys}
_KNOWN |= {key for name, aliases in COMPUTED.items() for key in (name, *aliases)} | set(_ADDITIONS)


def _unknown_arguments(overrides: Mapping[str, Any]) -> Iterator[Problem]:
    for key in overrides.keys() - _KNOWN - RUN_OPTIONS:
        yield Problem(key, "not an option of a run", f"known are {', '.join(sorted(RUN_OPTIONS))}")


def _unexplained(
    error: BridgeError, spec: ModelSpec, tensors: Mapping[str, TensorInfo], dialect: Dialect
) -> list[Problem]:
    """The problems that stay when the config's numbers are replaced by the weights' own."""
    in_tensors: dict[str, Any] = {field: number for field, (number, _) in numbers_of(tensors, dialect).items()}
    try:
        make_plan(dense_rules(replace(spec, **in_tensors)), tensors, dialect, dialect)
    except (BridgeError, ValueError) as remaining:
        return remaining.problems if isinstance(remaining, BridgeError) else error.problems
    return []


def summary(model: Model) -> Iterator[str]:
    """What was found, line by line, for a person."""
    spec, checkpoint = model.spec, model.checkpoint
    tied = "tied" if spec.tie_word_embeddings else "untied"
    dtypes = ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))
    files = len({tensor.file for tensor in checkpoint.tensors.values()})
    plan = model.plan(INFER)
    yield (
        f"model       Qwen3, {spec.num_layers} layers, hidden_size {spec.hidden_size}, "
        f"{spec.num_attention_heads} heads and {spec.num_query_groups} KV heads of {spec.head_dim}, "
        f"ffn_hidden_size {spec.ffn_hidden_size}, vocab_size {spec.vocab_size}, {tied} embeddings"
    )
    yield (
        f"checkpoint  {model.dialect}, {len(checkpoint.tensors)} tensors, {checkpoint.nbytes / 2**20:.1f} MiB "
        f"({dtypes}) in {files} {'file' if files == 1 else 'files'}"
    )
    yield f"plan        {plan.num_source_tensors} tensors become {len(plan.targets)} MindFormers parameters"
    yield from (f"note        {note}" for note in model.notes)
    if plan.ignored:
        yield f"note        {len(plan.ignored)} tensors are state of a training run and are left out"
    yield "result      config and weights fit"
