"""What a checkpoint's tensors say by themselves: whose names they bear, in which layout they lie, which model it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mf_qwen3_bridge.errors import BridgeError, Problem
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parameters import (
    OUTPUT,
    PARAMETERS,
    Parameter,
    is_expert_name,
    is_hf_name,
    is_mindformers_name,
    layer_of,
)
from mf_qwen3_bridge.model.rules import Dialect, hf_dialect
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
    if not any(map(is_mindformers_name, names)):
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
        stacked_experts=any(is_expert_name(name) and len(tensor.shape) == 3 for name, tensor in names.items()),
    )


def holds_experts(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are a MoE's."""
    return any(map(is_expert_name, checkpoint.tensors))


def saved_by_ranks(checkpoint: Checkpoint) -> int | None:
    """How many tensor parallel ranks saved what the bridge merged, if the files say it."""
    stamp = checkpoint.metadata.get(RANKS_STAMP, "")
    return int(stamp) if re.fullmatch("[1-9][0-9]{0,8}", stamp) else None


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


def numbers_of(tensors: Mapping[str, TensorInfo], dialect: Dialect) -> dict[str, tuple[int, str]]:
    """What the tensors' shapes show of a :class:`ModelSpec`: those of its first layer, and the embedding's.

    Returns:
        {field: (number, the tensor that shows it)}; only the fields that the shapes show.
    """
    layers = {number for name in tensors if (number := layer_of(name)) is not None}
    if not layers:
        return {}
    # (length of an axis, the numbers that add up to it, the tensor); where one is unknown, the others give it.
    sums = [entry for parameter in PARAMETERS for entry in _sums(parameter, tensors, dialect, min(layers))]
    found: dict[str, tuple[int, str]] = {}
    if max(layers) < len(tensors):
        found["num_layers"] = (max(layers) + 1, f"layers.{max(layers)}")
    while solved := next(filter(None, (_solved(found, *entry) for entry in sums)), None):
        found |= solved
    head_dim, _ = found.get("head_dim", (0, ""))
    for field, rows in ("num_attention_heads", "query_rows"), ("num_query_groups", "key_value_rows"):
        number, tensor = found.pop(rows, (0, ""))
        if number and head_dim and number % head_dim == 0:
            found[field] = (number // head_dim, tensor)
    return found


def _sums(
    parameter: Parameter, tensors: Mapping[str, TensorInfo], dialect: Dialect, layer: int
) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """The axes of what ``tensors`` has of a parameter: (length, the numbers that add up to it, name and shape)."""
    shape = parameter.shape
    columns = (shape.columns,) if shape.columns else ()
    axes: dict[str, dict[int, tuple[str, ...]]] = {}
    if not dialect.is_hf:
        # Experts are transposed; without an axis of their own, their first one is a product.
        axes[parameter.mindformers] = {-1: shape.rows} if shape.per_expert else {0: shape.rows, 1: columns}
    elif shape.per_expert and dialect.stacked_experts:
        axes[parameter.stacked] = {1: shape.rows, 2: columns}
    else:
        axes |= {part: {0: (rows,), 1: columns} for part, rows in zip(parameter.parts, shape.rows)}
    for pattern, terms in axes.items():
        tensor = tensors.get(pattern.format(layer=layer, expert=0))
        if tensor is None:
            continue
        for axis, numbers in terms.items():
            if numbers and -len(tensor.shape) <= axis < len(tensor.shape):
                yield tensor.shape[axis], numbers, f"{tensor.name} {tensor.shape}"


def _solved(
    found: Mapping[str, tuple[int, str]], length: int, numbers: tuple[str, ...], tensor: str
) -> dict[str, tuple[int, str]] | None:
    """The only number of a sum that is not known yet."""
    unknown = {number for number in numbers if number not in found}
    if len(unknown) != 1:
        return None
    (name,) = unknown
    rest, count = length - sum(found[number][0] for number in numbers if number in found), numbers.count(name)
    return {name: (rest // count, tensor)} if rest > 0 and rest % count == 0 else None
