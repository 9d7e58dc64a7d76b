"""What a checkpoint's tensors say by themselves: whose names they bear, in which layout they lie, which model it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mf_qwen3_bridge.checkpoint import Checkpoint, TensorInfo
from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.layouts import Layout
from mf_qwen3_bridge.rules import EMBEDDING, HF, Dialect

# Under this key, the metadata of every MindFormers file that the bridge writes names the layout.
LAYOUT_STAMP = "mf_qwen3_bridge.layout"


def dialect_of(checkpoint: Checkpoint, configured: Layout | None = None, origin: str = "YAML") -> Dialect:
    """Whose names the tensors bear and, for MindFormers', in which layout they lie.

    Args:
        checkpoint: the tensors. The files' metadata may bear the bridge's stamp.
        configured: the layout that the YAML says they were trained in.
        origin: the YAML's name, for messages.

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
    try:
        stamped = Layout.parse(stamp) if stamp else None
    except ValueError as error:
        raise BridgeError(f"{checkpoint.path}: {error} in the files' metadata; which program wrote it?") from error
    if stamped and configured and stamped != configured:
        raise BridgeError(
            "the layouts of QKV and gate/up contradict each other",
            [Problem("layout", f"files: {stamped}\n{origin}: {configured}", f"in the YAML: {stamped.training_flags}")],
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
    found: dict[str, tuple[int, str]] = {}
    if max(layers) < len(tensors):
        found["num_layers"] = (max(layers) + 1, f"layers.{max(layers)}")

    def read(field: str, name: str, axis: int, unit: int = 1) -> None:
        tensor = tensors.get(name)
        if tensor and unit and len(tensor.shape) > axis and tensor.shape[axis] % unit == 0:
            found[field] = (tensor.shape[axis] // unit, f"{name} {tensor.shape}")

    read("vocab_size", dialect.name(EMBEDDING), 0)
    read("hidden_size", dialect.name(EMBEDDING), 1)
    if dialect.is_hf:
        read("ffn_hidden_size", f"{hf_prefix}.mlp.gate_proj.weight", 0)
        read("head_dim", f"{hf_prefix}.self_attn.q_norm.weight", 0)
        head_dim = found.get("head_dim", (0, ""))[0]
        read("num_attention_heads", f"{hf_prefix}.self_attn.q_proj.weight", 0, head_dim)
        read("num_query_groups", f"{hf_prefix}.self_attn.k_proj.weight", 0, head_dim)
    else:
        read("ffn_hidden_size", f"{mf_prefix}.mlp.linear_fc2.weight", 1)
        read("head_dim", f"{mf_prefix}.self_attention.q_layernorm.weight", 0)
        head_dim = found.get("head_dim", (0, ""))[0]
        read("num_attention_heads", f"{mf_prefix}.self_attention.linear_proj.weight", 1, head_dim)
        read("num_query_groups", f"{mf_prefix}.self_attention.linear_qkv.weight", 0, head_dim)
        if "num_query_groups" in found:  # q, k and v together, up to here
            heads, tensor = found.pop("num_query_groups")
            key_value = heads - found.get("num_attention_heads", (heads, ""))[0]
            if key_value > 0 and key_value % 2 == 0:
                found["num_query_groups"] = (key_value // 2, tensor)
    return found
