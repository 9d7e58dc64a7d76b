"""Reads what a MindFormers YAML, for training or for inference, declares about a checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError, Problem, refuse
from mf_qwen3_bridge.inputs.documents import read_document
from mf_qwen3_bridge.model.layouts import TRAINING_DEFAULT, Layout
from mf_qwen3_bridge.model.spec import HF_NAME, MINDFORMERS_NAMES, ModelSpec

# What model.model_config may hold is of five kinds.
# 1. The model's numbers (spec.NAMES) and what it computes with: have to be what config.json declares, and what
#    MindFormers' Qwen3 computes. MindFormers knows several names for one thing.
COMPUTED_NAMES: dict[str, tuple[str, ...]] = {
    "rms_norm_eps": ("layernorm_epsilon", "layer_norm_epsilon"),
    "rope_theta": ("rotary_base", "theta"),
    "attention_bias": ("add_qkv_bias", "qkv_has_bias"),
    "position_embedding_type": ("extend_method",),
    "rotary_interleaved": ("rope_interleave",),
    "window_size": ("window_attn_skip_freq",),
    "mtp_num_layers": ("mtp_depth", "num_nextn_predict_layers"),
    "quantization": ("quantization_config",),
    "num_experts_per_tok": ("moe_router_topk", "num_experts_chosen"),
    "moe_router_score_function": ("scoring_func", "use_gating_sigmoid"),
    "moe_router_topk_scaling_factor": ("routed_scaling_factor",),
    "moe_router_num_groups": ("n_group",),
    "moe_router_group_topk": ("topk_group",),
    "moe_router_enable_expert_bias": ("balance_via_topk_bias",),
    "moe_shared_expert_intermediate_size": ("shared_expert_num", "n_shared_experts"),
    "moe_layer_freq": ("decoder_sparse_step",),
    "use_alibi_mask": ("use_alibi",),
}
# It knows these by one name.
_OF_ONE_NAME = """
    hidden_act partial_rotary_factor softmax_scale use_sliding_window use_rope_scaling
    rotary_seq_len_interpolation_factor apply_residual_connection_post_layernorm nope_layer_interval normalization
    gated_linear_unit add_bias_linear multi_latent_attention experimental_attention_variant norm_topk_prob
    first_k_dense_replace mlp_only_layers enable_expert_relocation moe_router_force_expert_balance
"""
COMPUTED_NAMES |= dict.fromkeys(_OF_ONE_NAME.split(), ())
# Of no meaning without experts.
_OF_EXPERTS = {"num_experts_per_tok", "norm_topk_prob", *(name for name in COMPUTED_NAMES if name.startswith("moe_"))}
# 2. Additions to config.json: YaRN is asked for so.
ADDITIONS = frozenset({"rope_scaling"})
# 3. Options of the run: how the same function is computed, not which. Only these reach the network.
DTYPE_OPTIONS = {"param_init_type": "params_dtype"} | {
    f"{name}_dtype": f"{name}_dtype" for name in ("params", "compute", "layernorm_compute", "softmax_compute", "rotary")
}
SIZE_OPTIONS = frozenset({"seq_length", "block_size", "num_blocks"})
OPTIONS = DTYPE_OPTIONS.keys() | SIZE_OPTIONS | {"qkv_concat"}
# 4. The bridge's own: PEFT adapters that an inference network's weights are merged with, as --adapter takes them.
ADAPTER_KEY = "pretrained_adapter_dir"
# 5. Everything else: not used.

# Of an inference YAML's parallel_config: the sizes of a ParallelConfig, and what the bridge can't divide by.
PARALLEL_SIZES = {"model_parallel": "tensor_parallel", "expert_parallel": "expert_parallel"}
NOT_PARALLEL = ("data_parallel", "pipeline_stage", "context_parallel")

LAYOUT_FLAGS = TRAINING_DEFAULT.training_flags.keys()
# Everything that declares something of the model.
MODEL_KEYS = ADDITIONS | LAYOUT_FLAGS | {key for keys in MINDFORMERS_NAMES.values() for key in keys}
MODEL_KEYS |= {key for name, aliases in COMPUTED_NAMES.items() for key in (name, *aliases)}
_TRAINING_MODES = ("train", "finetune", "train_with_eval", "eval", "predict_with_train_model")
_DTYPES = ("float32", "float16", "bfloat16")


def computed_values(hf_config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """For each of COMPUTED_NAMES the values that mean what a normalised config.json and MindFormers' Qwen3 compute."""
    absent = (None, 0, False)
    values: dict[str, tuple[Any, ...]]
    values = {name: (hf_config[name],) if name in hf_config else absent for name in COMPUTED_NAMES} | {
        "hidden_act": (hf_config["hidden_act"], "swiglu"),  # MindFormers' name for silu in a gated unit
        "position_embedding_type": ("yarn",) if hf_config["rope_scaling"] else ("rope",),
        "partial_rotary_factor": (1.0,),
        "normalization": ("RMSNorm",),
        "gated_linear_unit": (True,),
        "moe_router_score_function": ("softmax", False),
        "moe_router_topk_scaling_factor": (1.0,),
        "moe_layer_freq": (1,),
        "mlp_only_layers": ([],),
    }
    has_experts = bool(hf_config.get("num_experts"))
    return {name: accepted for name, accepted in values.items() if has_experts or name not in _OF_EXPERTS}


def run_options(model_config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The options of the run under the names that MindFormers 1.7 to 2.1 share, and what is wrong with them."""
    options: dict[str, Any] = {}
    problems = []
    for key, value in model_config.items():
        if value is None:
            continue  # MindFormers' default
        if key in DTYPE_OPTIONS:
            if value not in _DTYPES:
                problems.append(Problem(key, repr(value), f"one of {', '.join(_DTYPES)}"))
            elif options.setdefault(DTYPE_OPTIONS[key], value) != value:
                problems.append(Problem(key, f"{value}, and {options[DTYPE_OPTIONS[key]]} elsewhere", "remove one"))
        elif key in SIZE_OPTIONS:
            if not _is_size(value):
                problems.append(Problem(key, repr(value), "a positive whole number"))
            options[key] = value
        elif key == "qkv_concat":
            options[key] = bool(value)
    return options, problems


def declared_flags(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The layout flags that a ``model.model_config`` or a caller declares, with their values."""
    return {flag: model_config[flag] for flag in LAYOUT_FLAGS if model_config.get(flag) is not None}


@dataclass(frozen=True)
class MindFormersConfig:
    """What a MindFormers YAML, called ``origin`` in messages, declares: its ``model.model_config``, and all of it."""

    origin: str = "YAML"
    model_config: dict[str, Any] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def is_for_training(self) -> bool:
        """Whether it runs the training network: then its options of the run are not inference's."""
        return self.document.get("run_mode") in _TRAINING_MODES

    def section(self, name: str) -> dict[str, Any]:
        """A section of the document; empty if there is none, or something else has its name."""
        found = self.document.get(name)
        return found if isinstance(found, dict) else {}

    def layout_of_weights(self, has_experts: bool, saved_by: int | None) -> Layout | None:
        """The layout of weights that ``saved_by`` tensor parallel ranks saved; None if the YAML does not declare it.

        Raises:
            BridgeError: a flag is neither true nor false; the layout depends on the number of ranks, and the YAML
                declares another one.
        """
        flags = declared_flags(self.model_config)
        wrong = [Problem(key, repr(value), "true or false") for key, value in flags.items() if type(value) is not bool]
        refuse(f"{self.origin} can't be used", wrong)
        if not self.is_for_training and len(flags) < len(LAYOUT_FLAGS):
            return None
        layout = Layout.of_training(flags, self.parallel_sizes(training=True).get("tensor_parallel", 1))
        if not self.is_for_training and saved_by is None and layout != layout.on(2):
            return None  # an inference YAML does not declare the size of the training run
        if has_experts:
            layout = layout.of_experts
        if saved_by is None or layout == layout.on(saved_by):
            return layout
        if self.document.get("use_parallel"):
            found = f"{self.origin}: {layout.tensor_parallel}\nwhat the ranks saved: {saved_by}"
            remedy = "give the YAML that the weights were trained with: contiguous layouts depend on it"
            raise BridgeError(f"{self.origin} is not of this run", [Problem("model_parallel", found, remedy)])
        return layout.on(saved_by)

    def slice_problems(self) -> Iterator[Problem]:
        """Ways in which a training run with this YAML divides tensors, and the bridge's directory per rank does not."""
        config, parallel = self.section("parallel_config"), self.section("parallel")
        remedy = "convert without --tp and --ep, and let auto_trans_ckpt cut the weights"
        for key in ("pipeline_stage", "context_parallel"):
            if config.get(key) not in (None, 1):
                yield Problem(f"parallel_config.{key}", str(config[key]), remedy)
        if parallel.get("enable_parallel_optimizer"):
            yield Problem("parallel.enable_parallel_optimizer", "True", remedy)

    def parallel_sizes(self, training: bool) -> dict[str, int]:
        """How a training run with this YAML, or an inference run, is spread: the known fields of a ParallelConfig."""
        if self.is_for_training != training or not self.document.get("use_parallel"):
            return {}
        config = self.section("parallel_config")
        return {name: config[key] for key, name in PARALLEL_SIZES.items() if _is_size(config.get(key))}

    def parallel_problems(self) -> Iterator[Problem]:
        """Sizes of an inference run with this YAML that are wrong, or that the bridge can't divide by."""
        if self.is_for_training or not self.document.get("use_parallel"):
            return
        config = self.section("parallel_config")
        for key in PARALLEL_SIZES:
            if config.get(key) is not None and not _is_size(config[key]):
                yield Problem(f"parallel_config.{key}", repr(config[key]), "a positive whole number")
        for key in NOT_PARALLEL:
            if config.get(key) not in (None, 1, False):
                yield Problem(f"parallel_config.{key}", repr(config[key]), "the bridge runs tensor and expert parallel")

    def hf_config(self, spec: ModelSpec) -> tuple[dict[str, Any], list[str]]:
        """A config.json made of the model's numbers and what the YAML declares, and the keys that it does not."""
        kind = "qwen3_moe" if spec.is_moe else "qwen3"
        config: dict[str, Any] = {"model_type": kind, **{HF_NAME[field]: n for field, n in spec.numbers.items()}}
        required = ["max_position_embeddings", "rms_norm_eps", "rope_theta"]
        required += ["num_experts_per_tok", "norm_topk_prob"] if spec.is_moe else []
        optional = ["rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"]
        for name in required + optional:
            for key in (name, *COMPUTED_NAMES.get(name, ())):
                if (value := self.model_config.get(key)) is not None:
                    if name in ("rms_norm_eps", "rope_theta") and isinstance(value, str):
                        with suppress(ValueError):  # YAML takes 1e-6 for a string; what is no number is refused later
                            value = float(value)
                    config[name] = value
        return config, [name for name in required if name not in config]

    def named_path(self, key: str) -> Path | None:
        """The path that a top-level key names; BridgeError if no file can have that name."""
        named = self.document.get(key)
        if not named:
            return None
        try:
            path = Path(named)
            with suppress(FileNotFoundError):
                path.stat()
        except (OSError, ValueError, TypeError) as error:
            found = f"{named!r} ({getattr(error, 'strerror', None) or error})"
            raise BridgeError(f"{self.origin} can't be used", [Problem(key, found, "a path that exists")]) from error
        return path


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def read_mindformers_config(path: Path | None) -> MindFormersConfig:
    """A MindFormers YAML, of training or inference, or one that declares nothing; BridgeError if a file is not one."""
    if path is None:
        return MindFormersConfig()
    import yaml  # only those who have a YAML need it

    document = read_document(path, yaml.safe_load, "YAML")
    model = document.get("model") if isinstance(document, dict) else None
    model_config = model.get("model_config") if isinstance(model, dict) else None
    if not isinstance(model_config, dict):
        raise BridgeError(f"{path} has no model.model_config section: is it a MindFormers YAML?")
    return MindFormersConfig(str(path), model_config, document)
