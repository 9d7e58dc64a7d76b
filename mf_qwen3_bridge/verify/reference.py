"""Computes Qwen3 and Qwen3-MoE in numpy, a layer at a time: the reference for MindFormers' networks.

Written from the architecture, for clarity, not speed; the tests compare it with transformers' logits. Weights are read
when they are used, so one layer has to fit in memory.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint
from mf_qwen3_bridge.model.layouts import Box
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT
from mf_qwen3_bridge.model.rules import HF
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.plan import Target

_ROWS_OF_OUTPUT = 16 << 10  # of the output layer, read and multiplied at a time


@dataclass(frozen=True)
class Stage:
    """A value that both the network and the reference compute: in a layer (None outside), by MindFormers' module."""

    layer: int | None
    name: str

    def __str__(self) -> str:
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


# In the order in which a layer computes them. Only dense layers have linear_fc1, only others have a router.
QKV, ATTENTION, PROJ = "self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj"
ROUTER, FC1, MLP, LAYER = "mlp.router", "mlp.linear_fc1", "mlp", "output"
STAGES = (QKV, ATTENTION, PROJ, ROUTER, FC1, MLP, LAYER)
EMBEDDED, LOGITS = Stage(None, "embedding"), Stage(None, "logits")


def forward(
    model: CheckedCheckpoint, token_ids: Sequence[int], given: Mapping[Stage, np.ndarray] | None = None
) -> Iterator[tuple[Stage, np.ndarray]]:
    """Computes one sequence, and yields the value of each stage.

    Args:
        model: a model with ``hf_config``; its weights may be in any dialect.
        token_ids: the sequence.
        given: the values of a network's stages. Each layer starts from the network's input to this layer, so that
            rounding does not accumulate and a wrong layer does not make later ones wrong.

    Yields:
        The embedding, each stage of each layer, and then the logits, float32 (len(token_ids), width). ``linear_qkv`` is
        [q k v], ``linear_fc1`` [gate up]; the router's value is the routing weights, 0 for experts not selected.
    """
    given = given or {}
    rope = _rope(model, len(token_ids))
    weights = {target.name: target for target in model.plan(HF, "F32").targets}
    with Transfer() as transfer:

        def rows(name: str, start: int, count: int = 1) -> np.ndarray:
            stop = min(start + count, model.spec.vocab_size)
            return weights[name].block(Box((start, stop))).make(transfer)

        stage = EMBEDDED
        hidden = np.concatenate([rows(EMBEDDING[0], token) for token in token_ids])
        yield stage, hidden
        for number in range(model.spec.num_layers):
            layer = _Layer(model, weights, transfer, number)
            for name, value in layer.forward(given.get(stage, hidden), rope):
                yield Stage(number, name), value
            stage, hidden = Stage(number, LAYER), value
        hidden = layer.norm(given.get(stage, hidden), weights["model.norm.weight"].make(transfer))
        output = EMBEDDING[0] if model.spec.tie_word_embeddings else OUTPUT[0]
        starts = range(0, model.spec.vocab_size, _ROWS_OF_OUTPUT)
        yield LOGITS, np.hstack([hidden @ rows(output, start, _ROWS_OF_OUTPUT).T for start in starts])


@dataclass(frozen=True)
class _Layer:
    model: CheckedCheckpoint
    weights: Mapping[str, Target]  # of the model, under Hugging Face's names, in float32
    transfer: Transfer
    number: int

    def weight(self, name: str) -> np.ndarray:
        return self.weights[f"model.layers.{self.number}.{name}.weight"].make(self.transfer)

    def norm(self, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """RMSNorm over the last axis."""
        epsilon = self.model.hf_config["rms_norm_eps"]
        return weight * values / np.sqrt((values**2).mean(-1, keepdims=True) + np.float32(epsilon))

    def forward(self, hidden: np.ndarray, rope: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields all stages; the last is the layer's output."""
        normed = self.norm(hidden, self.weight("input_layernorm"))
        query, key, value = (normed @ self.weight(f"self_attn.{name}_proj").T for name in "qkv")
        yield QKV, np.hstack([query, key, value])
        attended = self.attend(query, key, value, rope)
        yield ATTENTION, attended
        projected = attended @ self.weight("self_attn.o_proj").T
        yield PROJ, projected
        hidden = hidden + projected
        normed = self.norm(hidden, self.weight("post_attention_layernorm"))
        if self.model.spec.is_moe:
            shares = self.route(normed)
            yield ROUTER, shares
            mlp = self.mix(normed, shares)
        else:
            gate, up = (normed @ self.weight(f"mlp.{name}_proj").T for name in ("gate", "up"))
            yield FC1, np.hstack([gate, up])
            mlp = (_silu(gate) * up) @ self.weight("mlp.down_proj").T
        yield MLP, mlp
        yield LAYER, hidden + mlp

    def attend(
        self, query: np.ndarray, key: np.ndarray, value: np.ndarray, rope: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        """Causal attention; the query heads of a group share a key and a value."""
        spec = self.model.spec
        tokens = len(query)
        heads = (tokens, spec.num_query_groups, -1, spec.head_dim)
        queries, keys, values = (array.reshape(heads) for array in (query, key, value))
        queries = _rotate(self.norm(queries, self.weight("self_attn.q_norm")), *rope)
        keys = _rotate(self.norm(keys, self.weight("self_attn.k_norm")), *rope)
        scores = np.einsum("tghd,sgd->ghts", queries, keys[:, :, 0]) / np.float32(math.sqrt(spec.head_dim))
        scores[..., np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
        return np.einsum("ghts,sgd->tghd", _softmax(scores), values[:, :, 0]).reshape(tokens, -1)

    def route(self, normed: np.ndarray) -> np.ndarray:
        """Routing weights, (tokens, experts); 0 for experts not selected."""
        config = self.model.hf_config
        probabilities = _softmax(normed @ self.weight("mlp.gate").T)
        others = np.argsort(-probabilities, axis=-1, kind="stable")[:, config["num_experts_per_tok"] :]
        np.put_along_axis(probabilities, others, 0, axis=-1)
        return probabilities / probabilities.sum(-1, keepdims=True) if config["norm_topk_prob"] else probabilities

    def mix(self, normed: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Weighted sum of the selected experts' outputs, (tokens, hidden_size)."""
        result = np.zeros_like(normed)
        for expert in np.flatnonzero(shares.any(axis=0)):
            gate, up, down = (self.weight(f"mlp.experts.{expert}.{name}_proj") for name in ("gate", "up", "down"))
            tokens = np.flatnonzero(shares[:, expert])
            made = (_silu(normed[tokens] @ gate.T) * (normed[tokens] @ up.T)) @ down.T
            result[tokens] += shares[tokens, expert, None] * made
        return result


def _silu(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values / (1 + np.exp(-values))


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _rope(model: CheckedCheckpoint, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary embedding, float32 (tokens, head_dim / 2)."""
    config, dim = model.hf_config, model.spec.head_dim
    theta, yarn = config["rope_theta"], config["rope_scaling"]
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    scale = 1.0
    if yarn:  # https://arxiv.org/abs/2309.00071
        length = yarn["original_max_position_embeddings"]

        def dimension(rotations: float) -> float:
            """The dimension that rotates this many times within the original length."""
            return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(dimension(yarn["beta_fast"])), 0)
        last = min(math.ceil(dimension(yarn["beta_slow"])), dim - 1)
        slow = np.clip((np.arange(dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        frequencies = frequencies * (1 - slow) + frequencies / yarn["factor"] * slow
        stretch = math.log(yarn["factor"])
        scale = (0.1 * yarn["mscale"] * stretch + 1) / (0.1 * yarn["mscale_all_dim"] * stretch + 1)
    angles = np.outer(np.arange(tokens), frequencies)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def _rotate(heads: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """Rotates each pair (i, i + head_dim / 2) of an array (tokens, groups, heads, head_dim)."""
    left, right = np.split(heads, 2, axis=-1)
    cosines, sines = cosines[:, None, None], sines[:, None, None]
    return np.concatenate([left * cosines - right * sines, right * cosines + left * sines], axis=-1)
