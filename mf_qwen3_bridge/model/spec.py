"""The numbers that a Qwen3 model's weights depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Each number's names: in ModelSpec; in a Hugging Face config.json; in a MindFormers YAML's model.model_config.
# A MindFormers YAML may use the Hugging Face name as well.
NAMES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("num_layers", "num_hidden_layers", ("num_layers", "n_layer")),
    ("hidden_size", "hidden_size", ()),
    ("num_attention_heads", "num_attention_heads", ("num_heads", "n_head")),
    ("num_query_groups", "num_key_value_heads", ("num_query_groups", "n_kv_heads")),
    ("head_dim", "head_dim", ("kv_channels",)),
    ("ffn_hidden_size", "intermediate_size", ("ffn_hidden_size",)),
    ("vocab_size", "vocab_size", ()),
    ("tie_word_embeddings", "tie_word_embeddings", ()),
    ("num_experts", "num_experts", ("num_moe_experts", "num_routed_experts", "n_routed_experts", "expert_num")),
    ("moe_ffn_hidden_size", "moe_intermediate_size", ("moe_ffn_hidden_size",)),
)

HF_NAME = {field: hf_name for field, hf_name, _ in NAMES}
MINDFORMERS_NAMES = {field: (*names, hf_name) for field, hf_name, names in NAMES}
# The numbers of the other kind of model, by whether this one is a MoE.
_OF_OTHER_KIND = {True: ("ffn_hidden_size",), False: ("num_experts", "moe_ffn_hidden_size")}


@dataclass(frozen=True)
class ModelSpec:
    """A Qwen3 or Qwen3-MoE model's dimensions, in Megatron's and MindFormers' terms.

    Attributes:
        num_query_groups: key/value heads; each serves num_attention_heads / num_query_groups query heads.
        head_dim: width of one head. In Qwen3 it is a number of its own, not hidden_size / num_attention_heads.
        ffn_hidden_size: width of the gated MLP; 0 in MoE, whose layers have experts instead.
        tie_word_embeddings: whether the output layer is the embedding.
        num_experts: experts of each layer; 0 in a dense model.
        moe_ffn_hidden_size: width of each expert; 0 in a dense model.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any]) -> ModelSpec:
        """From a config.json or a YAML's ``model.model_config``, under either's names; KeyError names what it lacks."""
        found: dict[str, Any] = {"tie_word_embeddings": False}
        names = ((field, key) for field, keys in MINDFORMERS_NAMES.items() for key in keys)
        found |= {field: model_config[key] for field, key in names if model_config.get(key) is not None}
        found |= dict.fromkeys(_OF_OTHER_KIND[bool(found.get("num_experts"))], 0)
        if missing := HF_NAME.keys() - found.keys():
            raise KeyError(", ".join(field for field in HF_NAME if field in missing))
        return cls(**found)

    @property
    def is_moe(self) -> bool:
        """Whether its layers have experts (Qwen3-MoE) instead of one MLP (dense Qwen3)."""
        return self.num_experts > 0

    @property
    def numbers(self) -> dict[str, Any]:
        """Those of its fields that mean something in a model of its kind."""
        return {field: getattr(self, field) for field in HF_NAME if field not in _OF_OTHER_KIND[self.is_moe]}

    @property
    def query_rows(self) -> int:
        """Rows of q_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_rows(self) -> int:
        """Rows of k_proj, and of v_proj."""
        return self.num_query_groups * self.head_dim
