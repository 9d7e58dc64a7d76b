"""From a checkpoint to a network that generates text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.config import read_json
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.mindformers.load import load_network
from mf_qwen3_bridge.mindformers.network import build_inference_network
from mf_qwen3_bridge.mindformers.patch import patch
from mf_qwen3_bridge.preflight import Model, check

# An id that no prompt holds.
NO_TOKEN = -1


def from_pretrained(
    model_dir: str | Path,
    *,
    config: str | Path | None = None,
    load_checkpoint: str | Path | None = None,
    use_training_conversion: bool = False,
    device_target: str = "auto",
    **model_config_overrides: Any,
) -> Any:
    """MindFormers' inference network with a checkpoint's weights in it, ready for ``network.generate(...)``.

    Args:
        model_dir: a Hugging Face directory.
        config: a MindFormers YAML; its ``model.model_config`` goes before config.json where both speak.
        load_checkpoint: where the weights are, when they are not in ``model_dir``: a MindFormers training
            checkpoint, for example, together with the YAML it was trained with.
        use_training_conversion: convert with MindFormers' own training class instead of the bridge's loader; same bits.
        device_target: ``Ascend``, ``CPU``, or ``auto``: Ascend when there is one.
        model_config_overrides: further entries of ``model.model_config``, such as ``params_dtype="bfloat16"``.

    Returns:
        An ``InferenceQwen3ForCausalLM``.

    Raises:
        BridgeError: the checkpoint is not whole, does not fit its config, or can't be computed by MindFormers.
    """
    model = check(
        Path(model_dir),
        Path(config) if config else None,
        Path(load_checkpoint) if load_checkpoint else None,
        model_config_overrides,
    )
    network = build_network(model, device_target)
    load_network(network, model, use_training_conversion=use_training_conversion)
    return network


def build_network(model: Model, device_target: str = "auto") -> Any:
    """The inference network for a checked checkpoint, without its weights."""
    patch()
    return build_inference_network(model.hf_config | model.options, device_target=device_target)


def stop_tokens(model_dir: Path) -> list[int]:
    """The token ids that end a text: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        eos = read_json(path).get("eos_token_id") if path.is_file() else None
        if eos is not None:
            return eos if isinstance(eos, list) else [eos]
    return []


def load_tokenizer(tokenizer_path: Path) -> Any:
    """The checkpoint's own tokenizer, by transformers.

    Raises:
        BridgeError: there is none, or it can't be loaded.
    """
    from transformers import AutoTokenizer

    if not any((tokenizer_path / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        raise BridgeError(f"no tokenizer in {tokenizer_path}: give its directory with --tokenizer_path")
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer_path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise BridgeError(f"the tokenizer in {tokenizer_path} can't be loaded: {error}") from error


def generate_texts(
    network: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat: bool,
    max_length: int,
    max_new_tokens: int,
    enable_thinking: bool = False,
    **generation: Any,
) -> Iterator[str]:
    """For each prompt, the text that upstream's ``network.generate`` adds to it.

    Args:
        network: a loaded network.
        tokenizer: its tokenizer.
        prompts: texts to continue, or to answer when ``chat``.
        chat: put the prompt into the tokenizer's chat template.
        max_length: most tokens of prompt and answer together; upstream would cut without an error.
        max_new_tokens: most tokens of an answer.
        enable_thinking: the chat template's switch.
        generation: ``network.generate``'s own arguments.

    Raises:
        BridgeError: a prompt is empty, or too long.
    """
    for prompt in prompts:
        if chat:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
            )
        input_ids = tokenizer(prompt)["input_ids"]
        if not input_ids:
            raise BridgeError("an empty prompt: there is nothing to continue")
        if len(input_ids) + max_new_tokens > max_length:
            raise BridgeError(
                f"a prompt of {len(input_ids)} tokens and an answer of {max_new_tokens} are more than {max_length}: "
                "lower --max_new_tokens, shorten the prompt, or raise seq_length in the YAML's model.model_config, as "
                "far as the model's positions go"
            )
        output = network.generate(
            input_ids=[input_ids],
            max_new_tokens=max_new_tokens,
            pad_token_id=NO_TOKEN,  # upstream takes the pad tokens that end a prompt away
            **generation,
        )
        yield tokenizer.decode(output[0][len(input_ids) :], skip_special_tokens=True)
