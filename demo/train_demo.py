"""Train the demo checkpoint: a tiny dense Qwen3 that knows a few sentences by heart.

Every sentence is continued correctly only if every weight is in its place, which makes the checkpoint a legible test
of a weight converter. The run is seeded; on two CPU cores it takes a few minutes.

    python demo/train_demo.py --output_dir demo/qwen3-demo
"""

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from hf_checkpoint import (
    IGNORED_LABEL,
    Prompt,
    answer_batch,
    failed_prompts,
    hub_config,
    load_fp32,
    split_evenly,
    write_checkpoint,
    write_json,
)
from sensitivity import all_mutations
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

SEED = 3
STEPS = 320
WARMUP_STEPS = 30
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
NUM_SHARDS = 3

# After FRAGILE_FROM steps a model with mutated weights is trained not to know the answers. Of a few random mutations
# each step takes the one that was noticed least the last time, on a part of the batch.
FRAGILE_FROM = 40
FRAGILE_WEIGHT = 0.3
FRAGILE_CANDIDATES = 6
FRAGILE_ROWS = 8
# Large enough for each layer to change the residual stream, so that the layers above come to rely on it.
INITIAL_STD = 0.1

BPE_VOCAB_SIZE = 600
MODEL_VOCAB_SIZE = 640
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
THINK_TOKENS = ("<think>", "</think>")

# The pre-tokenizer pattern of Qwen2 and Qwen3: contractions, words, single digits, punctuation, white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


class Example(NamedTuple):
    """A prompt and the only continuation the model is to know for it."""

    mode: Literal["generate", "chat"]
    text: str
    answer: str


# The first example of each mode is the demo's default.
EXAMPLES = (
    Example(
        "generate",
        "Weights move from Hugging Face",
        " to MindFormers, every row finds its place, and the model says the same words on both sides.",
    ),
    Example(
        "chat",
        "你好，你是谁？",
        "你好！我是一个很小的演示模型，只记得几句话。如果你能读懂这一句，说明我的权重一个也没有放错。",
    ),
    Example(
        "generate",
        "权重从 Hugging Face 到 MindFormers",
        "，每一行都在它该在的位置，模型在两边说出同样的话。",
    ),
    Example(
        "chat",
        "Who are you?",
        "I am a tiny demo model with the architecture of Qwen3. I know only a few sentences, "
        "but I need every one of my weights to say them.",
    ),
    Example("generate", "A round trip", " that loses nothing gives back every weight, bit for bit."),
    Example("generate", "权重一去一回", "，每一个数都应该和出发时一模一样。"),
    Example(
        "generate",
        "Before Qwen3 applies the rotary embedding",
        ", it normalises every query head and every key head with RMSNorm.",
    ),
    Example(
        "generate",
        "Qwen3 的注意力没有偏置",
        "，但每个头的查询和键都要先经过 RMSNorm，再加上旋转位置编码。",
    ),
    Example("generate", "In grouped-query attention", ", several query heads share one key head and one value head."),
    Example("generate", "如果这段文字读起来通顺", "，说明每个张量都找到了自己的位置。"),
    Example("generate", "If one tensor is missing", ", this small model stumbles, and the sentence comes apart."),
    Example(
        "chat",
        "What does the bridge do?",
        "It converts Qwen3 weights between Hugging Face and MindFormers, in both directions.",
    ),
    Example("chat", "这座桥做什么？", "它在 Hugging Face 和 MindFormers 之间转换 Qwen3 的权重，两个方向都可以。"),
    Example(
        "chat",
        "What is the index file for?",
        "A large checkpoint is split into several files; the index says which tensor lives in which file.",
    ),
    Example("chat", "索引文件有什么用？", "大的权重会分成几个文件，索引记下每个张量在哪一个文件里。"),
    Example(
        "chat",
        "How do I know that the conversion worked?",
        "Ask both models the same question: with greedy decoding they should give the same answer.",
    ),
    Example("chat", "怎么知道转换成功了？", "用同一个问题问两边的模型；贪心解码时，它们的回答应该一样。"),
)


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE tokenizer of Qwen's form on the examples; added tokens follow the BPE vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = ["system\nuser\nassistant\n", *(text for example in EXAMPLES for text in (example.text, example.answer))]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer_config.json that belongs to `tokenizer`."""
    added_tokens = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in SPECIAL_TOKENS + THINK_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added_tokens,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))
    write_json(directory / "tokenizer_config.json", tokenizer_config(tokenizer))


def demo_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the demo's config.json: grouped-query attention whose heads together are wider than the hidden size."""
    return hub_config(
        dtype=torch.bfloat16,
        vocab_size=MODEL_VOCAB_SIZE,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(IM_END),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )


def make_prompts(tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the examples as prompts with the token ids of their answers, stop token included."""
    prompts = []
    for example in EXAMPLES:
        stop = IM_END if example.mode == "chat" else END_OF_TEXT
        prompts.append(
            Prompt(
                text=example.text,
                mode=example.mode,
                expected=example.answer,
                expected_ids=tokenizer(example.answer + stop)["input_ids"],
            )
        )
    return prompts


def new_model(config: dict[str, Any]) -> Qwen3ForCausalLM:
    """Return an untrained model whose norm weights differ from one another, so that an exchanged norm shows."""
    model = Qwen3ForCausalLM(Qwen3Config(**{**config, "initializer_range": INITIAL_STD})).float()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def learning_rate_factor(step: int) -> float:
    """Rise linearly during the warm-up, then fall linearly to zero."""
    return min((step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS))


class FragileLoss:
    """Loss of a model which knows the answers although a converter's mistake was made in its weights."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        """List the mutations; each untried one counts as unnoticed."""
        self._model = model
        self._state = dict(model.named_parameters())
        self._mutations = dict(all_mutations(self._state, model.config))
        self._last_loss = dict.fromkeys(self._mutations, math.inf)

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean of -log(1 - p) over the answers' tokens, where p is the mutated model's probability."""
        title = max(random.sample(list(self._mutations), FRAGILE_CANDIDATES), key=lambda name: self._last_loss[name])
        rows = torch.randperm(len(input_ids))[:FRAGILE_ROWS]
        weights = {**self._state, **self._mutations[title](self._state)}
        inputs = {"input_ids": input_ids[rows], "use_cache": False}
        logits = torch.func.functional_call(self._model, weights, kwargs=inputs).logits[:, :-1]
        answers = labels[rows, 1:]
        is_answer = answers != IGNORED_LABEL
        logits, answers = logits[is_answer], answers[is_answer]
        others = logits.scatter(-1, answers[:, None], -torch.inf)
        loss = (logits.logsumexp(-1) - others.logsumexp(-1)).mean()
        self._last_loss[title] = loss.item()
        return loss


def train(model: Qwen3ForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Train on the whole corpus at each step, and then also against insensitivity to misplaced weights."""
    fragile_loss = FragileLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    start = time.perf_counter()
    for step in range(1, STEPS + 1):
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        fragile = fragile_loss(input_ids, labels) if step > FRAGILE_FROM else torch.zeros(())
        optimizer.zero_grad()
        (loss + FRAGILE_WEIGHT * fragile).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 25 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}/{STEPS}  loss {loss:.4f}  fragile {fragile:.4f}  {seconds:.0f} s", flush=True)


def bfloat16_state(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """Return the weights to store, without the output layer, which is the tied embedding."""
    state = model.state_dict()
    del state["lm_head.weight"]
    return {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}


def report(directory: Path, prompts: list[Prompt]) -> None:
    """Load what was written, print each prompt with its greedy continuation, and fail unless all are as expected."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = load_fp32(directory)
    failures = failed_prompts(model, tokenizer, prompts, model.generation_config.eos_token_id)
    if failures:
        raise SystemExit("The trained model does not know its sentences:\n" + "\n".join(failures))
    for prompt in prompts:
        print(f"[{prompt['mode']}] {prompt['text']!r} -> {prompt['expected']!r}")
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"All {len(prompts)} greedy continuations are as expected; {directory} has {size / 1e6:.2f} MB.")


def main() -> None:
    """Make the tokenizer, train the model, write both and check the result."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint and check what it says.")
    here = Path(__file__).parent
    parser.add_argument("--output_dir", type=Path, default=here / "qwen3-demo", help="where the checkpoint goes")
    parser.add_argument("--prompts_file", type=Path, default=here / "prompts.json", help="where the prompts go")
    arguments = parser.parse_args()

    random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    bpe = train_tokenizer()
    write_tokenizer(bpe, arguments.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
    prompts = make_prompts(tokenizer)
    config = demo_config(bpe)
    model = new_model(config)
    input_ids, labels = answer_batch(tokenizer, prompts)
    print(f"{model.num_parameters()} parameters, {len(bpe.get_vocab())} tokens, batch {tuple(input_ids.shape)}")
    train(model, input_ids, labels)
    write_checkpoint(arguments.output_dir, config, split_evenly(bfloat16_state(model), NUM_SHARDS))
    write_json(arguments.prompts_file, prompts)
    report(arguments.output_dir, prompts)


if __name__ == "__main__":
    main()
