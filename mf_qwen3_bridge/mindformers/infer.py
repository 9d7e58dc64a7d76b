"""Loads a checkpoint into a network that generates text."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.hf_config import read_json
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint, check
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.mindformers.network import build_inference_network, check_token_ids
from mf_qwen3_bridge.model.parallel import num_processes

# An id that no prompt holds: upstream takes the pad tokens that end a prompt away.
NO_TOKEN = -1


def from_pretrained(
    model_dir: str | Path,
    *,
    config: str | Path | None = None,
    load_checkpoint: str | Path | None = None,
    adapter: Any = None,
    use_training_conversion: bool = False,
    device_target: str = "auto",
    expert_parallel: int | None = None,
    **model_config_overrides: Any,
) -> Any:
    """Builds MindFormers' inference network and loads a checkpoint's weights, ready for ``network.generate(...)``.

    ``network.generate`` ends a text at the end tokens of the checkpoint's generation_config.json. It wants the prompts
    of a batch padded on the right with -1 to one length, and cuts what exceeds ``seq_length`` (4096) without an error.

    Of the process this changes what MindFormers and MindSpore have one of: where there was no MindFormers context, the
    one for inference is built and stays (``mindformers.set_context(run_mode="finetune")`` before a training network is
    built); on a CPU, MindSpore's mode is PyNative from then on, and the stand-ins for Ascend's operators are in place
    until a training network's config is built. The environment and numpy's random numbers are as before:
    ``network.generate`` sets ``RUN_MODE=predict`` and, on a CPU, ``ENFORCE_EAGER=true`` while it runs. Set them to call
    the network itself.

    Args:
        model_dir: a Hugging Face directory.
        config: a MindFormers YAML; its dtypes and cache sizes are used; the model's numbers in it have to fit.
        load_checkpoint: where the weights are, when they are not in ``model_dir``: a MindFormers training
            checkpoint, for example, together with the YAML it was trained with.
        adapter: a PEFT adapter's directory (LoRA, DoRA), which is merged when the weights are read: a path,
            ``"DIR:SCALE"``, a pair (path, scale), or a list of several, which add up.
        use_training_conversion: convert with MindFormers' own training class instead of the bridge's loader; same bits.
        device_target: ``Ascend``, ``CPU``, or ``auto``: Ascend when there is one.
        expert_parallel: processes that share the experts of a Qwen3-MoE. Tensor parallel are all processes that msrun
            started; each reads and holds its part only.
        model_config_overrides: further options of ``model.model_config``, such as ``params_dtype="bfloat16"``.

    Returns:
        An ``InferenceQwen3ForCausalLM`` or ``InferenceQwen3MoeForCausalLM``.

    Raises:
        BridgeError: the checkpoint is not whole, does not fit its config, or can't be computed by MindFormers.

    Example::

        import mf_qwen3_bridge
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("demo/qwen3-demo")
        network = mf_qwen3_bridge.from_pretrained("demo/qwen3-demo")
        prompt = tokenizer("Weights move from Hugging Face")["input_ids"]
        (tokens,) = network.generate(input_ids=[prompt], max_new_tokens=32, do_sample=False)
        print(tokenizer.decode(tokens, skip_special_tokens=True))
    """
    model = check(
        Path(model_dir),
        Path(config) if config else None,
        Path(load_checkpoint) if load_checkpoint else None,
        model_config_overrides,
        adapters=adapter,
        expert_parallel=expert_parallel,
        num_processes=num_processes(),
    )
    for note in model.notes:
        warnings.warn(note, stacklevel=2)
    network = build_network(model, device_target)
    load_network(network, model, use_training_conversion=use_training_conversion)
    return network


def build_network(model: CheckedCheckpoint, device_target: str = "auto") -> Any:
    """Builds the inference network of a checked checkpoint, without its weights; ``generate`` knows its end tokens."""
    end_tokens = read_end_tokens(model.hf_dir)
    network = build_inference_network(
        model.hf_config | model.options, device_target=device_target, parallel=model.parallel
    )
    network.generation_config.eos_token_id = end_tokens
    network.generation_config.pad_token_id = NO_TOKEN
    return network


def read_end_tokens(hf_dir: Path) -> list[int]:
    """Reads the token ids that end a text from generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = hf_dir / name
        eos = read_json(path).get("eos_token_id") if path.is_file() else None
        if eos is not None:
            tokens = eos if isinstance(eos, list) else [eos]
            if not all(type(token) is int for token in tokens):
                raise BridgeError(f"{path}: eos_token_id is {eos!r}, no token id or list of token ids")
            return tokens
    return [NO_TOKEN]


def load_tokenizer(tokenizer_path: Path) -> Any:
    """Loads the checkpoint's own tokenizer by transformers; BridgeError says why it can't be."""
    from transformers import AutoTokenizer

    if not any((tokenizer_path / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        raise BridgeError(f"no tokenizer in {tokenizer_path}: give its directory with --tokenizer_path")
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer_path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise BridgeError(f"the tokenizer in {tokenizer_path} can't be loaded: {error}") from error


def encode(tokenizer: Any, prompt: str, *, chat: bool, enable_thinking: bool = False) -> list[int]:
    """Encodes a prompt; with ``chat`` as a user's message in the tokenizer's chat template."""
    if chat:
        if not tokenizer.chat_template:
            raise BridgeError("the tokenizer has no chat template: use --test_mode generate, or copy its files again")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    input_ids: list[int] = tokenizer(prompt)["input_ids"]
    if not input_ids:
        raise BridgeError("an empty prompt: there is nothing to continue")
    return input_ids


def check_prompts(model: CheckedCheckpoint, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    """Refuses prompts of another model's tokens, and those that leave no room for an answer.

    Upstream cuts an answer at ``seq_length`` without an error, and fails beyond its tables.
    """
    for prompt in prompts:
        check_token_ids(prompt, model.spec.vocab_size)
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.max_length:
        raise BridgeError(
            f"a prompt of {longest} tokens and an answer of {max_new_tokens} are more than {model.max_length}: lower "
            "--max_new_tokens, shorten the prompt, or raise what limits it: seq_length or num_blocks in the YAML's "
            "model.model_config, as far as config.json's max_position_embeddings goes"
        )


def generate_text(network: Any, tokenizer: Any, input_ids: list[int], **generation: Any) -> str:
    """Returns what upstream's ``network.generate`` adds to a prompt; ``generation`` are its own arguments."""
    output = network.generate(input_ids=[input_ids], **generation)
    return str(tokenizer.decode(output[0][len(input_ids) :], skip_special_tokens=True))
