"""What a checkpoint's tensors say by themselves: whose names they bear, in which layout they lie, which model it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import EMBEDDING, OUTPUT, Dialect, hf_dialect
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.safetensors import Checkpoint, TensorInfo

# Under this key, the metadata of every MindFormers file that the bridge writes names the layout.
LAYOUT_STAMP = "mf_qwen3_bridge.layout"
# And that of merged files of which only the training YAML knows the layout, how many ranks shared attention and MLP.
RANKS_STAMP = "mf_qwen3_bridge.tensor_parallel"


def dialect_of(
    checkpoint: Checkpoint, configured: Layout | None = None, origin: str = "YAML", default: Layout | None = None
) -> Dialect:
    """Whose names the tensors bear and, for MindFormers', in which layout they lie.

    Args:
        checkpoint: the tensors. The files' metadata may bear the bridge's stamp.
        configured: the layout that the YAML says they were trained in.
        origin: the YAML's name, for messages.
        default: the layout to take when neither stamp nor YAML says one.

    Raises:
        BridgeError: the names are nobody's, or the layout is not known, or stamp and YAML contradict each other.
    """
    names = checkpoint.tensors
    if any(map(is_hf_name, names)):
        return hf_dialect(names)
    if not any(name.startswith(("decoder.", "embedding.")) for name in names):
        some = ", ".join(sorted(names)[:3])
        raise BridgeError(f"{checkpoint.path}: the tensors' names are neither Hugging Face's nor MindFormers' ({some})")
    stamp = checkpoint.metadata.get(LAYOUT_STAMP)
    try:
        stamped = Layout.parse(stamp) if stamp else None
    except ValueError as error:
        raise BridgeError(f"{checkpoint.path}: {error} in the files' metadata; which program wrote it?") from error
    if stamped and holds_experts(checkpoint):
        stamped = stamped.of_experts
    if stamped and configured and stamped != configured:
        remedy = f"in the YAML: {stamped.training_flags}"
        if stamped.training_flags == configured.training_flags:
            remedy = f"in the YAML: use_parallel True, parallel_config.model_parallel {stamped.tensor_parallel}"
        raise BridgeError(
            "the layouts of QKV and gate/up contradict each other",
            [Problem("layout", f"files: {stamped}\n{origin}: {configured}", remedy)],
        )
    layout = stamped or configured or default
    if layout is None:
        raise BridgeError(
            f"{checkpoint.path} holds MindFormers weights, but nothing says how QKV and gate/up lie in them, and the "
            "wrong guess would load without an error and compute garbage. The YAML they were trained with says it "
            "(use_contiguous_weight_layout_attention, use_interleaved_weight_layout_mlp): mf-qwen3's commands take it "
            "with --config; for run_mindformer.py, export them to Hugging Face with it (mf-qwen3 export --config)"
        )
    return Dialect(
        layout,
        stacked_experts=any(name.endswith(".experts.weight1") and len(names[name].shape) == 3 for name in names),
    )


def is_hf_name(name: str) -> bool:
    """Whether only Hugging Face calls a tensor so."""
    return name.startswith(("model.layers.", "model.embed_tokens."))


def holds_experts(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are a MoE's."""
    return any(".experts." in name for name in checkpoint.tensors)


def saved_by_ranks(checkpoint: Checkpoint) -> int | None:
    """How many tensor parallel ranks saved what the bridge merged, if the files say it."""
    stamp = checkpoint.metadata.get(RANKS_STAMP, "")
    return int(stamp) if stamp.isdigit() else None


def spec_of(tensors: Mapping[str, TensorInfo], dialect: Dialect, tied: bool | None = None) -> ModelSpec:
    """The model that the tensors' shapes show; tied to the embedding is an output layer that is not there.

    Args:
        tensors: all of them.
        dialect: how they are named and laid out.
        tied: whether the output layer is the embedding, if that is known apart from them.

    Raises:
        KeyError: the shapes don't show all numbers; names those that are missing.
    """
    tied = dialect.name(OUTPUT) not in tensors if tied is None else tied
    numbers = {field: number for field, (number, _) in numbers_of(tensors, dialect).items()}
    return ModelSpec.from_model_config(numbers | {"tie_word_embeddings": tied})


# What the shapes say: (field, tensor of a layer, axis). Rows of heads are divided by head_dim below.
_HF_SHAPES = (
    ("head_dim", "self_attn.q_norm.weight", 0),
    ("num_attention_heads", "self_attn.q_proj.weight", 0),
    ("num_query_groups", "self_attn.k_proj.weight", 0),
    ("ffn_hidden_size", "mlp.gate_proj.weight", 0),
    ("num_experts", "mlp.gate.weight", 0),
    ("moe_ffn_hidden_size", "mlp.experts.0.gate_proj.weight", 0),
    ("moe_ffn_hidden_size", "mlp.experts.down_proj", 2),
)
_MINDFORMERS_SHAPES = (
    ("head_dim", "self_attention.q_layernorm.weight", 0),
    ("num_attention_heads", "self_attention.linear_proj.weight", 1),
    ("num_query_groups", "self_attention.linear_qkv.weight", 0),  # q, k and v together
    ("ffn_hidden_size", "mlp.linear_fc2.weight", 1),
    ("num_experts", "mlp.router.weight", 0),
    ("moe_ffn_hidden_size", "mlp.experts.weight1", -1),  # gate and up together
)


def numbers_of(tensors: Mapping[str, TensorInfo], dialect: Dialect) -> dict[str, tuple[int, str]]:
    """What the tensors' shapes say about a ModelSpec's fields.

    Returns:
        {field: (number, the tensor that says so)}; only fields that can be told.
    """
    layers = {int(match.group(1)) for name in tensors if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if not layers:
        return {}
    prefix = f"{dialect.name(('model', 'decoder'))}.layers.{min(layers)}."
    shapes = [
        (field, prefix + name, axis) for field, name, axis in (_HF_SHAPES if dialect.is_hf else _MINDFORMERS_SHAPES)
    ]
    shapes += [(field, dialect.name(EMBEDDING), axis) for axis, field in enumerate(("vocab_size", "hidden_size"))]
    found: dict[str, tuple[int, str]] = {}
    if max(layers) < len(tensors):
        found["num_layers"] = (max(layers) + 1, f"layers.{max(layers)}")
    for field, name, axis in shapes:
        shape = tensors[name].shape if name in tensors else ()
        if -len(shape) <= axis < len(shape):
            found[field] = (shape[axis], f"{name} {shape}")

    def divide(field: str, by: int) -> None:
        number, tensor = found.pop(field, (0, ""))
        if number > 0 and by > 0 and number % by == 0:
            found[field] = (number // by, tensor)

    head_dim = found.get("head_dim", (0, ""))[0]
    divide("num_attention_heads", head_dim)
    divide("num_query_groups", head_dim)
    if not dialect.is_hf:
        if "num_query_groups" in found:
            number, tensor = found["num_query_groups"]
            found["num_query_groups"] = (number - found.get("num_attention_heads", (number, ""))[0], tensor)
            divide("num_query_groups", 2)
        divide("moe_ffn_hidden_size", 2)
    return found
