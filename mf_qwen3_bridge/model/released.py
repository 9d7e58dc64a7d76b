"""The released sizes of Qwen3."""

from mf_qwen3_bridge.model.spec import ModelSpec

# num_layers, hidden_size, num_attention_heads, num_query_groups, head_dim, ffn_hidden_size, vocab_size, tied,
# num_experts, moe_ffn_hidden_size
RELEASED = {
    "Qwen3-0.6B": ModelSpec(28, 1024, 16, 8, 128, 3072, 151936, True),
    "Qwen3-1.7B": ModelSpec(28, 2048, 16, 8, 128, 6144, 151936, True),
    "Qwen3-4B": ModelSpec(36, 2560, 32, 8, 128, 9728, 151936, True),
    "Qwen3-8B": ModelSpec(36, 4096, 32, 8, 128, 12288, 151936, False),
    "Qwen3-14B": ModelSpec(40, 5120, 40, 8, 128, 17408, 151936, False),
    "Qwen3-32B": ModelSpec(64, 5120, 64, 8, 128, 25600, 151936, False),
    "Qwen3-30B-A3B": ModelSpec(48, 2048, 32, 4, 128, 0, 151936, False, 128, 768),
    "Qwen3-235B-A22B": ModelSpec(94, 4096, 64, 4, 128, 0, 151936, False, 128, 1536),
}
