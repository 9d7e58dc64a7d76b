"""From a checked model to the directory that is to be made of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.convert.file_layout import HF_SHARD_BYTES, hf_files, mindformers_files, output_file, rank_file
from mf_qwen3_bridge.convert.run import Job, Part
from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs.hf_config import normalise, read_json
from mf_qwen3_bridge.inputs.lora_runs import LoraRun, lora_config_file
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint
from mf_qwen3_bridge.inputs.quantised import QUANTIZATION_KEYS
from mf_qwen3_bridge.inputs.source import HYPER_PARAMETERS, Source
from mf_qwen3_bridge.model import training_ranks
from mf_qwen3_bridge.model.lora import peft_module
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT, is_counter, layer_of
from mf_qwen3_bridge.model.rules import HF, INFER, Dialect
from mf_qwen3_bridge.transfer.plan import Plan, Target, write_slices
from mf_qwen3_bridge.transfer.safetensors import DTYPES, read_bytes

# What belongs to a model beside its weights and config.json, as transformers and the Hub name it.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_UNDIVIDED = "the model can't be divided like this"
# The dtypes of the command line, as safetensors and as a config.json spell them. None: as in the checkpoint.
_STORED: Mapping[str | None, str | None] = {None: None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_DECLARED = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def to_mindformers(model: CheckedCheckpoint, target: Dialect, output: Path, dtype: str | None = None) -> Job:
    """A MindFormers checkpoint of the dialect ``target``, made of one of any dialect.

    ``dtype`` is ``bf16``, ``fp16`` or ``fp32``; as in the checkpoint when left out. Raises BridgeError if the training
    run's tensor parallel size, on which a contiguous layout depends, doesn't divide the model.
    """
    blocks = ParallelConfig(target.layout.tensor_parallel if target.layout else 1)
    refuse(_UNDIVIDED, blocks.problems(model.spec, training=True))
    plan = model.plan(target, _STORED[dtype])
    files, index = mindformers_files(plan)
    return _job(model, plan, output, [Part.of(plan, files)], index)


def to_hf(
    model: CheckedCheckpoint,
    output: Path,
    dtype: str | None = None,
    max_shard_bytes: int = HF_SHARD_BYTES,
    write_tied_output: bool = False,
    layout_is_shown: bool = False,
) -> Job:
    """A Hugging Face checkpoint, with its config.json and tokenizer as far as they are known.

    Args:
        model, output, dtype: as for :func:`to_mindformers`; BridgeError if the model is Hugging Face's already.
        max_shard_bytes: a file is larger only if a single tensor is.
        write_tied_output: store ``lm_head`` although it is tied to the embedding.
        layout_is_shown: whether something else than files and YAML shows that the layout is right.
    """
    if model.dialect.is_hf and not any(tensor.computed for tensor in model.source.tensors.values()):
        raise BridgeError(f"{model.source.path} holds Hugging Face weights already")
    plan = model.plan(HF, _STORED[dtype])
    if write_tied_output and model.spec.tie_word_embeddings:
        plan = _with_output_layer(plan)
    files, index = hf_files(plan, max_shard_bytes)
    config = _config_json(model, dtype)
    others = dict(_companions(model))
    if config:
        others["config.json"] = json.dumps(config, indent=2).encode()
    notes = list(model.notes)
    if layout_is_shown:
        notes.append(f"rows of the weights in {model.hf_dir} show that {model.dialect.layout} is the right layout")
    if not config:
        notes.append(
            "no config.json is written: rope_theta and the like are not known. Name the Hugging Face directory of the "
            "model with --hf_config, or copy its config.json and tokenizer"
        )
    elif "tokenizer_config.json" not in others:
        notes.append(f"no tokenizer is written: there is none in {model.hf_dir}")
    job = _job(model, plan, output, [Part.of(plan, files)], others | index)
    return replace(job, notes=tuple(notes), warning="" if layout_is_shown else layout_warning(model))


def layout_warning(model: CheckedCheckpoint) -> str:
    """What to tell the user if nothing declares the layout of MindFormers weights; empty if something does."""
    if model.layout_is_declared:
        return ""
    return (
        f"the layout of QKV and gate/up is assumed to be MindFormers' default ({model.dialect.layout}): nothing "
        "declares it. If the training YAML sets other flags, the result computes garbage: give it with --config, or "
        "its flags: --use_contiguous_weight_layout_attention, --use_interleaved_weight_layout_mlp, --model_parallel"
    )


def to_peft(
    run: LoraRun, model: CheckedCheckpoint, output: Path, dtype: str | None = None, base: Path | None = None
) -> Job:
    """A PEFT adapter directory of what a LoRA run trained, for the Hugging Face model that it began with.

    Args:
        run, output: the run; the directory.
        model: the run's base model, or what is declared of it.
        dtype: as for :func:`to_mindformers`.
        base: the Hugging Face directory, for PEFT's ``base_model_name_or_path``.
    """
    plan = run.plan(model, _STORED[dtype])
    adapted = list(dict.fromkeys(peft_module(target.name) for target in plan.targets))
    alike = {module.rpartition(".")[2] for module in adapted}
    of_model = {part.removesuffix(".weight") for rule in model.rules for part in rule.tensors}
    # The last parts of their names, if all modules that have them are adapted; PEFT would adapt the others as well.
    is_all = all(module in adapted for module in of_model if module.rpartition(".")[2] in alike)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if base else None,
        "r": run.rank,
        "lora_alpha": int(run.alpha) if run.alpha == int(run.alpha) else run.alpha,
        "lora_dropout": run.dropout,
        "target_modules": sorted(alike) if is_all else adapted,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    file = output_file("adapter_model.safetensors", plan.targets, {"format": "pt"})
    others = {"adapter_config.json": json.dumps(config, indent=2).encode()}
    ignored = (*filter(is_counter, run.base.tensors), *run.base.left_out)
    source, count = f"LoRA of rank {run.rank}, alpha {run.alpha:g}, {model.dialect}", len(run.tensors)
    parts = (Part.of(plan, [file]),)
    return Job(source, count, "PEFT adapter", output, parts, others, ignored, may_be_zero=True, notes=model.notes)


def to_plain_hf(model: CheckedCheckpoint, output: Path, dtype: str | None = None) -> Job:
    """A Hugging Face checkpoint of one whose weights are computed, or are to have another dtype; experts one by one.

    ``dtype`` is as for :func:`to_mindformers`. Raises BridgeError if nothing would change, or the weights are
    MindFormers'.
    """
    if not model.dialect.is_hf:
        raise BridgeError(
            f"{model.source.path} holds MindFormers weights: mf-qwen3 export makes Hugging Face's of them"
        )
    plan = model.plan(HF, _STORED[dtype])
    sources = [copy.source for copy in plan.copies]
    if not any(source.computed for source in sources) and all(
        t.dtype == t.copies[0].source.dtype for t in plan.targets
    ):
        raise BridgeError(f"{model.source.path} holds plain Hugging Face weights already: nothing would change")
    files, others = hf_files(plan, HF_SHARD_BYTES)
    others |= _companions(model)
    others["config.json"] = json.dumps(_config_json(model, dtype), indent=2).encode()
    return _job(model, plan, output, [Part.of(plan, files)], others)


def _job(model: CheckedCheckpoint, plan: Plan, output: Path, parts: Sequence[Part], others: Mapping[str, bytes]) -> Job:
    """The job whose parts together make what ``plan`` does."""
    count, ignored = plan.num_source_tensors, (*plan.ignored, *model.source.left_out)
    source, target = str(model.dialect), str(plan.target)
    notes = (*(f"adapter {adapter.description}" for adapter in model.source.adapters), *model.notes)
    return Job(source, count, target, output, tuple(parts), others, ignored, notes=notes)


def _with_output_layer(plan: Plan) -> Plan:
    embedding = next(target for target in plan.targets if target.name == EMBEDDING[0])
    copies = tuple(replace(copy, target=OUTPUT[0]) for copy in embedding.copies)
    return replace(plan, targets=(*plan.targets, replace(embedding, name=OUTPUT[0], copies=copies)))


def _companions(model: CheckedCheckpoint) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the tokenizer and the like."""
    for file in (file for name in _COMPANIONS if (file := model.hf_dir / name).is_file()):
        try:
            yield file.name, file.read_bytes()
        except OSError as error:
            raise BridgeError(f"can't read {file}: {error.strerror}") from error


def _config_json(model: CheckedCheckpoint, dtype: str | None, is_quantised: bool = False) -> dict[str, Any]:
    """The model's own config.json, or one made of what the YAML says; with the dtype that is written."""
    own = model.hf_dir / "config.json"
    config = read_json(own) if own.is_file() else dict(model.hf_config)
    if own.is_file() and normalise(config)["rope_scaling"] != model.hf_config["rope_scaling"]:  # YaRN by the YAML
        config.pop("rope_parameters", None)
        config |= {key: model.hf_config[key] for key in ("rope_theta", "rope_scaling")}
    for key in () if is_quantised else QUANTIZATION_KEYS:
        config.pop(key, None)
    if config and dtype:
        keys = config.keys() & {"dtype", "torch_dtype"} or {"torch_dtype"}
        config |= dict.fromkeys(keys, _DECLARED[dtype])
    return config


def to_ranks(
    model: CheckedCheckpoint, target: Dialect, output: Path, parallel: ParallelConfig, dtype: str | None = None
) -> Job:
    """A directory ``rank_N/`` for each rank, with that rank's part of every parameter, for inference or training.

    In training, ranks beyond the tensor and expert parallel sizes hold the same again. Raises BridgeError if these
    don't divide the model; the rest is as for :func:`to_mindformers`.
    """
    is_for_inference = target == INFER
    refuse(_UNDIVIDED, parallel.problems(model.spec, training=not is_for_inference))
    kind = "qwen3_moe" if model.spec.is_moe else "qwen3"
    count = parallel.world_size if is_for_inference else training_ranks.world_size(parallel)
    whole = model.plan(target, _STORED[dtype])

    def plan_of(number: int) -> Plan:
        if is_for_inference:
            return model.plan(target, _STORED[dtype], parallel.rank(number))
        return write_slices(whole, dict(training_ranks.boxes(model.rules, target, parallel, number)))

    parts = []
    for number in range(count):
        plan = plan_of(number)
        parts.append(Part.of(plan, [rank_file(plan, number, kind)], partial(plan_of, number)))
    return _job(model, whole, output, parts, {})


def truncate(model: CheckedCheckpoint, num_layers: int, output: Path) -> Job:
    """The first layers of a model (BridgeError if it has fewer), byte for byte, with a config.json that declares so."""
    smaller = model.first_layers(num_layers)
    plan = smaller.plan(model.dialect)
    if plan.duplicates:
        plan = _with_output_layer(plan)  # stored although it is tied, as it was
    stored = model.source.stored  # what is quantised stays so
    if stored:
        kept = (t for name, t in stored.items() if (layer := layer_of(name)) is None or layer < num_layers)
        plan = replace(plan, targets=tuple(map(Target.of, kept)))
    files, others = hf_files(plan, HF_SHARD_BYTES) if model.dialect.is_hf else mindformers_files(plan)
    others |= _companions(model)
    config = _config_json(model, None, is_quantised=bool(stored)) | {"num_hidden_layers": num_layers}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:num_layers]
    others["config.json"] = json.dumps(config, indent=2).encode()
    return replace(_job(smaller, plan, output, [Part.of(plan, files)], others), checks_values=not stored)


def unify(source: Source, output: Path) -> Job:
    """The merged checkpoint of a training run, as ``mindspore.unified_safetensors`` writes it.

    Raises BridgeError if nothing is left to merge, or a tensor has a dtype that safetensors does not know.
    """
    tensors, unlisted = source.tensors, source.unlisted
    if not tensors:
        raise BridgeError("nothing is left to merge: does every parameter begin with --filter_out_param_prefix?")
    if odd := [t for t in (*tensors.values(), *unlisted.values()) if t.dtype not in DTYPES]:
        problems = [Problem(tensor.name, f"dtype {tensor.dtype}", "no weights are stored so") for tensor in odd]
        raise BridgeError(f"{odd[0].file} can't be merged", problems)
    dialect = Dialect(source.declared_layout)
    plan = Plan(dialect, tuple(Target.of(tensor) for tensor in tensors.values()))
    files, index = mindformers_files(plan, saved_by=source.tensor_parallel)
    others = {}
    if unlisted:  # counters and the like
        small = [Target(tensor.name, tensor.shape, tensor.dtype, ()) for tensor in unlisted.values()]
        file = output_file(HYPER_PARAMETERS, small, {"format": "ms"})
        others[file.name] = file.header + b"".join(read_bytes(unlisted[name]) for name in file.tensors)
    if source.lora and (declared := lora_config_file(source.path)):  # else the merged adapter's alpha is not known
        others[declared.name] = json.dumps(read_json(declared), indent=2).encode()
    parts, count = (Part.of(plan, files),), len(tensors) + len(unlisted)
    return Job("ranks' files", count, "MindFormers, merged", output, parts, others | index, checks_values=False)
