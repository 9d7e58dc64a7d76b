"""Says what was found about a checked checkpoint."""

from collections.abc import Iterator

from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint
from mf_qwen3_bridge.model.rules import INFER
from mf_qwen3_bridge.transfer.progress import size_text


def summary(model: CheckedCheckpoint) -> Iterator[str]:
    """What was found, line by line, for a person."""
    spec, source = model.spec, model.source
    tied = "tied" if spec.tie_word_embeddings else "untied"
    kind, mlp = "Qwen3", f"ffn_hidden_size {spec.ffn_hidden_size}"
    if spec.is_moe:
        kind, mlp = "Qwen3-MoE", f"{spec.num_experts} experts of moe_ffn_hidden_size {spec.moe_ffn_hidden_size}"
    stored = source.stored or source.tensors
    dtypes = ", ".join(sorted({tensor.dtype for tensor in stored.values()}))
    files = len(source.files)
    yield (
        f"model       {kind}, {spec.num_layers} layers, hidden_size {spec.hidden_size}, "
        f"{spec.num_attention_heads} heads and {spec.num_query_groups} KV heads of {spec.head_dim}, "
        f"{mlp}, vocab_size {spec.vocab_size}, {tied} embeddings"
    )
    yield (
        f"checkpoint  {model.dialect}, {len(stored)} tensors, {size_text(sum(t.nbytes for t in stored.values()))} "
        f"({dtypes}) in {files} {'file' if files == 1 else 'files'}"
    )
    yield from (f"adapter     {adapter.description}" for adapter in source.adapters)
    if source.quantization:
        yield f"quantised   {source.quantization}; dequantised when it is read, {size_text(source.nbytes)}"
    count = len(source.tensors) - len(model.ignored)
    yield f"plan        {count} tensors become {len(model.rules)} MindFormers parameters"
    if model.parallel.world_size > 1:
        share = model.plan(INFER, rank=model.parallel.rank(0)).source_nbytes
        yield (
            f"parallel    {model.parallel.world_size} processes (tensor parallel {model.parallel.tensor_parallel}, "
            f"expert parallel {model.parallel.expert_parallel}), each holds {size_text(share)}"
        )
    yield from (f"note        {note}" for note in model.notes)
    if model.ignored:
        yield f"note        {len(model.ignored)} tensors are state of a training run and are left out"
    yield "result      config and weights fit"
