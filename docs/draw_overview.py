"""Draws docs/pictures/overview.svg, the picture of the READMEs: where weights are, and what moves them.

python docs/draw_overview.py
"""

from __future__ import annotations

from pathlib import Path

from svg import LINE, arrow, box, document, words

PICTURE = "overview.svg"

_LEFT, _WIDTH, _HEIGHT, _GAP = 0, 230, 64, 46
_RIGHT, _TOP = 610, 6
_PAGE = 870

# Boxes on the right, from above: their lines, their colour, and the arrows between Hugging Face and them: which way,
# and the commands.
ROWS = (
    (
        ["inference network", "InferenceQwen3ForCausalLM"],
        "#f2a7b5",
        [("right", ["mf-qwen3 infer", "from_pretrained"])],
    ),
    (
        ["trainer", "run_mindformer.py"],
        "#d9b8f0",
        [("right", ["auto_register: mf_qwen3.Bridge", "in its YAML"])],
    ),
    (
        ["what the ranks saved", "rank_N/ and strategy files"],
        "#e6d36f",
        [("left", ["mf-qwen3 export", "--mindspore_ckpt_dir"])],
    ),
    (
        ["MindFormers checkpoint", "training or inference layout"],
        "#f7b977",
        [("right", ["mf-qwen3 convert"]), ("left", ["mf-qwen3 export --input_path"])],
    ),
)


def svg() -> str:
    """The picture."""
    tops = [_TOP + number * (_HEIGHT + _GAP) for number in range(len(ROWS))]
    bottom = tops[-1] + _HEIGHT
    lines = ["Hugging Face directory", "config.json, *.safetensors,", "tokenizer", "", "transformers, vLLM"]
    elements = box(_LEFT, _TOP, _WIDTH, bottom - _TOP, lines, "#9ec9f5")
    for top, (lines, colour, arrows) in zip(tops, ROWS):
        elements += box(_RIGHT, top, _WIDTH, _HEIGHT, lines, colour)
        for number, (way, commands) in enumerate(arrows):
            y = top + _HEIGHT * (number + 1) // (len(arrows) + 1)
            ends = [(_LEFT + _WIDTH + 4, y), (_RIGHT - 4, y)]
            elements.append(arrow(*(ends if way == "right" else ends[::-1])))
            for place, command in zip((y - 8, y + LINE - 2), commands):
                elements.append(words((_LEFT + _WIDTH + _RIGHT) // 2, place, command, anchor="middle"))
    # What passes between the boxes on the right.
    middle, edge = _RIGHT + _WIDTH // 2, _RIGHT + _WIDTH
    for above, text in ((1, "saves"), (2, "mf-qwen3 unify")):
        start, end = tops[above] + _HEIGHT, tops[above + 1]
        elements.append(arrow((middle, start + 3), (middle, end - 3)))
        elements.append(words(middle - 10, (start + end) // 2 + 4, text, anchor="end"))
    x, y = edge + 26, tops[-1] + _HEIGHT // 2
    for top in tops[:2]:
        elements.append(arrow((edge + 4, y), (x, y), (x, top + _HEIGHT // 2), (edge + 4, top + _HEIGHT // 2)))
    elements.append(words(x - 8, tops[1] - _GAP // 2 + 4, "load_checkpoint", anchor="end"))
    below = "mf-qwen3 check and inspect read headers; mf-qwen3 verify compares two checkpoints, bit for bit"
    elements.append(words(_PAGE // 2, bottom + 30, below, anchor="middle"))
    title = "Qwen3 weights in a Hugging Face directory and in MindFormers, and the commands that move them"
    return document(_PAGE, bottom + 42, title, elements, has_arrows=True)


def main() -> None:
    """Writes the picture."""
    (Path(__file__).resolve().parent / "pictures" / PICTURE).write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
