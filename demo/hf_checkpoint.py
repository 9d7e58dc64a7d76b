"""Small helpers to write Qwen3 checkpoints in the Hugging Face layout, to load them, and to decode greedily.

Shared by the scripts that make the demo checkpoint and the test fixtures, so that each of these things is defined once.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

State = dict[str, torch.Tensor]

MAX_NEW_TOKENS = 128
IGNORED_LABEL = -100


class Prompt(TypedDict):
    """One entry of prompts.json. `expected_ids` ends with the stop token, `expected` is its text without it."""

    text: str
    mode: Literal["generate", "chat"]
    expected: str
    expected_ids: list[int]


def hub_config(
    *,
    dtype: torch.dtype,
    vocab_size: int,
    bos_token_id: int,
    eos_token_id: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    tie_word_embeddings: bool,
    max_position_embeddings: int,
) -> dict[str, Any]:
    """Return a config.json with the keys that the Qwen3 configs on the Hub have."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "max_window_layers": num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": num_attention_heads,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a generation_config.json like the one of Qwen3, with the token ids of `config`."""
    end_of_text = config["bos_token_id"]
    return {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [config["eos_token_id"], end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0",
    }


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented UTF-8 JSON, ended by a newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def split_evenly(state: State, count: int) -> list[State]:
    """Split `state`, in its order, into `count` shards of about the same number of bytes."""
    total = sum(tensor.nbytes for tensor in state.values())
    shards: list[State] = [{} for _ in range(count)]
    done = 0
    for name, tensor in state.items():
        shards[min(done * count // total, count - 1)][name] = tensor
        done += tensor.nbytes
    return shards


def write_checkpoint(directory: Path, config: Mapping[str, Any], shards: Sequence[State]) -> None:
    """Write config, generation config and weights; more than one shard gets an index file, as on the Hub."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("model*.safetensors*"):
        stale.unlink()
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", generation_config(config))
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def read_config(directory: Path) -> PretrainedConfig:
    """Read config.json; what transformers 5 calls differently is spelled as 4.x understands it."""
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    rope_parameters = raw.pop("rope_parameters", None)
    if rope_parameters is not None:
        if rope_parameters["rope_type"] != "default":
            raise ValueError(f"{directory}: rope_type {rope_parameters['rope_type']!r} in rope_parameters")
        raw["rope_theta"] = rope_parameters["rope_theta"]
    if "num_local_experts" in raw:
        raw["num_experts"] = raw.pop("num_local_experts")
    return AutoConfig.for_model(**raw)


def load_fp32(directory: Path) -> PreTrainedModel:
    """Load a checkpoint in float32, with eager attention, ready for inference."""
    model = AutoModelForCausalLM.from_pretrained(directory, config=read_config(directory), attn_implementation="eager")
    return model.float().eval()


@torch.inference_mode()
def prompt_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits at all positions of `ids`, of shape (len(ids), vocab_size)."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def greedy(
    model: PreTrainedModel, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int] = ()
) -> list[int]:
    """Return up to `max_new_tokens` greedy new tokens; a token of `stop_ids` is the last one, and included."""
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        new_ids.append(int(prompt_logits(model, [*ids, *new_ids])[-1].argmax()))
        if new_ids[-1] in stop_ids:
            break
    return new_ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, mode: Literal["generate", "chat"], enable_thinking: bool = True
) -> list[int]:
    """Return the token ids which a model has to continue: the bare text, or the text as a chat's first turn."""
    if mode == "chat":
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
        )
    return tokenizer(text)["input_ids"]


def thinking_modes(prompt: Prompt) -> tuple[bool, ...]:
    """Return the values of `enable_thinking` under which a prompt is answered: both for a chat."""
    return (True, False) if prompt["mode"] == "chat" else (True,)


def answer_batch(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts with their answers, padded on the right, and labels which leave out all but the answers."""
    pairs = [
        (encode_prompt(tokenizer, prompt["text"], prompt["mode"], enable_thinking), prompt["expected_ids"])
        for prompt in prompts
        for enable_thinking in thinking_modes(prompt)
    ]
    width = max(len(prompt_ids) + len(answer_ids) for prompt_ids, answer_ids in pairs)
    input_ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, (prompt_ids, answer_ids) in enumerate(pairs):
        end = len(prompt_ids) + len(answer_ids)
        input_ids[row, :end] = torch.tensor(prompt_ids + answer_ids)
        labels[row, len(prompt_ids) : end] = torch.tensor(answer_ids)
    return input_ids, labels


def failed_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], stop_ids: Collection[int]
) -> list[str]:
    """Decode every prompt greedily (a chat with and without thinking) and describe each unexpected answer."""
    failures = []
    for prompt in prompts:
        for enable_thinking in thinking_modes(prompt):
            ids = encode_prompt(tokenizer, prompt["text"], prompt["mode"], enable_thinking)
            new_ids = greedy(model, ids, MAX_NEW_TOKENS, stop_ids)
            text = tokenizer.decode(new_ids, skip_special_tokens=True)
            if (text, new_ids) != (prompt["expected"], prompt["expected_ids"]):
                failures.append(f"{prompt['text']!r}: expected {prompt['expected']!r}, got {text!r} {new_ids}")
    return failures
