"""Show which mistakes of a weight converter the demo checkpoint's text gives away.

Each mutation of the weights imitates one mistake. An answer counts as changed when the greedy text of the mutated
model is not the expected one. Exits with 1 if a mutation leaves the text of both default prompts as it was.

    python demo/sensitivity.py
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from hf_checkpoint import IGNORED_LABEL, Prompt, State, answer_batch, encode_prompt, greedy, load_fp32
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

Mutation = Callable[[Mapping[str, torch.Tensor]], State]

SAMPLE_TOKENS = 10
NUM_DEFAULTS = 2


def zeroed(name: str) -> Mutation:
    """Return the mutation which sets one tensor to zero."""
    return lambda state: {name: torch.zeros_like(state[name])}


def swapped(first: str, second: str) -> Mutation:
    """Return the mutation which exchanges two tensors."""
    return lambda state: {first: state[second], second: state[first]}


def qkv_names(layer: int) -> list[str]:
    """Return the names of the query, key and value projection of a layer."""
    return [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"]


def interleave_read_as_contiguous(layer: int, config: Qwen3Config) -> Mutation:
    """Return the mutation: fuse q, k, v per group of one KV head, then split the rows as if all of q came first."""

    def mutate(state: Mapping[str, torch.Tensor]) -> State:
        names = qkv_names(layer)
        groups = [state[name].chunk(config.num_key_value_heads) for name in names]
        fused = torch.cat([part for group in zip(*groups, strict=True) for part in group])
        parts = torch.split(fused, [state[name].shape[0] for name in names])
        return dict(zip(names, parts, strict=True))

    return mutate


def contiguous_read_as_interleave(layer: int, config: Qwen3Config) -> Mutation:
    """Return the mutation: put q, k, v one after the other, then split the rows as if they came per KV group."""

    def mutate(state: Mapping[str, torch.Tensor]) -> State:
        names = qkv_names(layer)
        fused = torch.cat([state[name] for name in names])
        rows = [state[name].shape[0] // config.num_key_value_heads for name in names]
        groups = [torch.split(group, rows) for group in fused.chunk(config.num_key_value_heads)]
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*groups, strict=True), strict=True)}

    return mutate


def rotary_rows_paired(layer: int, config: Qwen3Config) -> Mutation:
    """Return the mutation: order each head's q and k rows for a rotary embedding of adjacent pairs, not of halves."""

    def mutate(state: Mapping[str, torch.Tensor]) -> State:
        def reorder(weight: torch.Tensor) -> torch.Tensor:
            heads = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
            return heads.transpose(1, 2).reshape(weight.shape)

        return {name: reorder(state[name]) for name in qkv_names(layer)[:2]}

    return mutate


def layer_mutations(layer: int, config: Qwen3Config) -> Iterator[tuple[str, Mutation]]:
    """Yield the named mutations of one layer, but for the zeroed tensors."""
    prefix = f"model.layers.{layer}"
    swaps = {
        "k/v": ("self_attn.k_proj", "self_attn.v_proj"),
        "gate/up": ("mlp.gate_proj", "mlp.up_proj"),
        "q_norm/k_norm": ("self_attn.q_norm", "self_attn.k_norm"),
        "input/post-attention norm": ("input_layernorm", "post_attention_layernorm"),
    }
    for title, (first, second) in swaps.items():
        yield f"layer {layer}: {title} swapped", swapped(f"{prefix}.{first}.weight", f"{prefix}.{second}.weight")
    yield f"layer {layer}: interleaved QKV read as contiguous", interleave_read_as_contiguous(layer, config)
    yield f"layer {layer}: contiguous QKV read as interleaved", contiguous_read_as_interleave(layer, config)
    yield f"layer {layer}: q and k rows in rotary pairs", rotary_rows_paired(layer, config)


def all_mutations(state: Mapping[str, torch.Tensor], config: Qwen3Config) -> Iterator[tuple[str, Mutation]]:
    """Yield every mutation with its name."""
    for layer in range(config.num_hidden_layers):
        yield from layer_mutations(layer, config)
    for name in state:
        yield f"{name} zeroed", zeroed(name)


@torch.inference_mode()
def changed_rows(model: Qwen3ForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor) -> list[bool]:
    """Tell for each row whether greedy decoding departs from the answer: one pass finds the first departure, if any."""
    predicted = model(input_ids=input_ids, use_cache=False).logits[:, :-1].argmax(-1)
    answer = labels[:, 1:]
    return ((predicted != answer) & (answer != IGNORED_LABEL)).any(-1).tolist()


def answer_start(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return how the model starts its greedy answer."""
    return tokenizer.decode(greedy(model, encode_prompt(tokenizer, prompt["text"], prompt["mode"]), SAMPLE_TOKENS))


def main() -> None:
    """Print one line per mutation: how many answers change, which of the defaults do, and how the first one goes on.

    A chat counts as two answers, with and without thinking; the rows 0 and 1 are the default prompts.
    """
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Show which weight mistakes change the demo checkpoint's text.")
    parser.add_argument("--model_dir", type=Path, default=here / "qwen3-demo", help="the demo checkpoint")
    parser.add_argument("--prompts_file", type=Path, default=here / "prompts.json", help="its prompts")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    model = load_fp32(arguments.model_dir)
    prompts: list[Prompt] = json.loads(arguments.prompts_file.read_text(encoding="utf-8"))
    input_ids, labels = answer_batch(tokenizer, prompts)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    unnoticed = 0
    for title, mutate in all_mutations(original, model.config):
        model.load_state_dict({**original, **mutate(original)}, strict=False)
        changed = changed_rows(model, input_ids, labels)
        unnoticed += not any(changed[:NUM_DEFAULTS])
        flags = " ".join("changed" if flag else "same" for flag in changed[:NUM_DEFAULTS])
        sample = answer_start(model, tokenizer, prompts[0])
        print(f"{title:58} {sum(changed):2}/{len(changed)}  {flags:15} {sample!r}")
    if unnoticed:
        raise SystemExit(f"{unnoticed} mutations leave the text of the default prompts as it was.")


if __name__ == "__main__":
    main()
