"""Draws docs/pictures/*.svg, the pictures of docs/layouts.md, from the rules themselves.

    python docs/draw_layouts.py

Every element of a tiny model's Hugging Face tensors gets a number. Plans made of the model's own rules say where each
number goes; what lies where is read off the result. So no layout is written down here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from svg import EDGE, INK, LETTER_WIDTH, document, words

from mf_qwen3_bridge.model import training_ranks
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import SINGLE, ParallelConfig
from mf_qwen3_bridge.model.rules import HF, HF_STACKED, INFER, TRAIN, Dialect, model_rules
from mf_qwen3_bridge.model.spec import ModelSpec
from mf_qwen3_bridge.transfer.plan import Plan, make_plan, write_slices
from mf_qwen3_bridge.transfer.safetensors import TensorInfo

# 8 query heads and 4 KV heads of 2 rows each; gate and up of 8 rows.
SPEC = ModelSpec(
    num_layers=1,
    hidden_size=2,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=2,
    ffn_hidden_size=8,
    vocab_size=8,
    tie_word_embeddings=True,
)
# 2 experts, whose gate and up have 2 rows of 3 numbers.
MOE_SPEC = replace(SPEC, hidden_size=3, ffn_hidden_size=0, num_experts=2, moe_ffn_hidden_size=2)
CONTIGUOUS = Dialect(Layout(interleaved_qkv=False, interleaved_gate_up=False))
CONTIGUOUS_2 = Dialect(Layout(interleaved_qkv=False, interleaved_gate_up=False, tensor_parallel=2))

LAYER = "decoder.layers.0"
QKV, PROJ = f"{LAYER}.self_attention.linear_qkv.weight", f"{LAYER}.self_attention.linear_proj.weight"
FC1, FC2 = f"{LAYER}.mlp.linear_fc1.weight", f"{LAYER}.mlp.linear_fc2.weight"
WEIGHT1, WEIGHT2 = f"{LAYER}.mlp.experts.weight1", f"{LAYER}.mlp.experts.weight2"
HF_ATTENTION, HF_MLP = "model.layers.0.self_attn", "model.layers.0.mlp"

# A Hugging Face tensor's letter and colour in the pictures, by its name.
_LETTERS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "g", "up_proj": "u"}
_LETTERS |= {"down_proj": "d"}
_COLOURS = {"q": "#9ec9f5", "k": "#f7b977", "v": "#a5d99b", "o": "#d0d4da"}
_COLOURS |= {"g": "#d9b8f0", "u": "#f2a7b5", "d": "#e6d36f"}


@dataclass(frozen=True)
class Strip:
    """The rows (or columns) of a tensor, one after the other.

    Attributes:
        title: what it is.
        boxes: a label for each head, or each row: whose rows lie there.
        blocks: the equal parts that are drawn apart.
    """

    title: str
    boxes: Sequence[str]
    blocks: int = 1


@dataclass(frozen=True)
class Matrix:
    """All elements of a tensor; of three axes, the first from top to bottom.

    Attributes:
        title: what it is.
        cells: their labels.
    """

    title: str
    cells: np.ndarray


Figure = Strip | Matrix


class Tiny:
    """A model whose Hugging Face tensors hold a number of its own in each element."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.rules = tuple(model_rules(spec))
        self.numbers: dict[str, np.ndarray] = {}
        self.origins: list[tuple[str, tuple[int, ...]]] = []
        for rule in self.rules:
            for place in rule.places(HF):
                array = np.arange(np.prod(place.shape)).reshape(place.shape) + len(self.origins)
                self.numbers[place.tensor] = array
                self.origins += [(place.tensor, index) for index in np.ndindex(*place.shape)]

    def plan(self, target: Dialect, parallel: ParallelConfig = SINGLE, number: int = 0) -> Plan:
        """What makes the tensors of a dialect, or what one rank holds of them."""
        infos = {
            name: TensorInfo(name, array.shape, "F32", Path("memory"), 0, 4 * array.size)
            for name, array in self.numbers.items()
        }
        if target == INFER:
            return make_plan(self.rules, infos, HF, target, rank=parallel.rank(number))
        whole = make_plan(self.rules, infos, HF, target)
        if parallel == SINGLE:
            return whole
        return write_slices(whole, dict(training_ranks.boxes(self.rules, whole.target, parallel, number)))

    def made(self, target: Dialect, parallel: ParallelConfig = SINGLE, number: int = 0) -> dict[str, np.ndarray]:
        """The tensors that the plan makes: which number lies where."""
        result = {}
        for tensor in self.plan(target, parallel, number).targets:
            result[tensor.name] = np.full(tensor.shape, -1)
            for copy in tensor.copies:
                source = self.numbers[copy.source.name]
                copy.target_view.of(result[tensor.name])[...] = copy.source_view.of(source)
            if (result[tensor.name] < 0).any():
                raise ValueError(f"{tensor.name}: nothing lies at some places")
        return result

    def strip(self, title: str, array: np.ndarray, axis: int = 0) -> Strip:
        """The rows of a tensor, or its columns (axis 1), a box for each head or each row of an MLP.

        Raises:
            ValueError: a row is not whole, or a head's rows do not lie together.
        """
        lines = array if axis == 0 else array.T
        firsts = [self.origins[number] for number in lines[:, 0]]
        for line, (tensor, index) in zip(lines, firsts):
            source = self.numbers[tensor] if axis == 0 else self.numbers[tensor].T
            if not np.isin(line, source[index[axis]]).all():
                raise ValueError(f"{title}: a line is made of several")
        size = self.spec.head_dim if _letter(firsts[0][0]) in "qkvo" else 1
        boxes = []
        for start in range(0, len(firsts), size):
            (tensor, index), *_ = box = firsts[start : start + size]
            if [(t, i[axis]) for t, i in box] != [(tensor, index[axis] + n) for n in range(size)] or index[axis] % size:
                raise ValueError(f"{title}: a head's rows do not lie together")
            boxes.append(f"{_letter(tensor)}{index[axis] // size}")
        return Strip(title, boxes)

    def matrix(self, title: str, array: np.ndarray) -> Matrix:
        """All elements of a tensor of experts: expert, part, row and column in Hugging Face's tensor of it."""

        def label(number: int) -> str:
            tensor, index = self.origins[number]
            expert = tensor.partition(".experts.")[2].partition(".")[0]
            return f"{expert}{_letter(tensor)}{''.join(map(str, index))}"

        return Matrix(title, np.vectorize(label)(array))


def _letter(tensor: str) -> str:
    return next(letter for part, letter in _LETTERS.items() if f".{part}" in tensor)


def figures() -> dict[str, list[Figure]]:
    """What each picture shows."""
    dense, moe = Tiny(SPEC), Tiny(MOE_SPEC)
    hf, train, contiguous, blocks = (dense.made(d) for d in (HF, TRAIN, CONTIGUOUS, CONTIGUOUS_2))
    infer = dense.made(INFER)
    two, eight = ParallelConfig(2), ParallelConfig(8)

    def of_ranks(parameter: str, target: Dialect, parallel: ParallelConfig, axis: int = 0) -> Iterator[Figure]:
        short = parameter.removesuffix(".weight").rpartition(".")[2] + (" (columns)" if axis else "")
        for number in range(parallel.tensor_parallel):
            array = dense.made(target, parallel, number)[parameter]
            yield dense.strip(f"rank {number}: {short}", array, axis)

    experts_hf = moe.made(HF)
    parts = [f"{HF_MLP}.experts.{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up", "down")]
    stacked = moe.made(HF_STACKED)
    return {
        "qkv_hf": [dense.strip(f"{x}_proj.weight", hf[f"{HF_ATTENTION}.{x}_proj.weight"]) for x in "qkv"],
        "qkv_interleaved": [dense.strip("linear_qkv.weight", train[QKV])],
        "qkv_contiguous": [dense.strip("linear_qkv.weight", infer[QKV])],
        "qkv_contiguous_mp2": [replace(dense.strip("linear_qkv.weight", blocks[QKV]), blocks=2)],
        "gate_up_hf": [dense.strip(f"{x}_proj.weight", hf[f"{HF_MLP}.{x}_proj.weight"]) for x in ("gate", "up")],
        "gate_up_interleaved": [dense.strip("linear_fc1.weight", train[FC1])],
        "gate_up_contiguous": [dense.strip("linear_fc1.weight", contiguous[FC1])],
        "gate_up_contiguous_mp2": [replace(dense.strip("linear_fc1.weight", blocks[FC1]), blocks=2)],
        "experts_hf": [moe.matrix(name.partition(".mlp.")[2], experts_hf[name]) for name in parts],
        "experts_hf_stacked": [
            moe.matrix(f"experts.{name}", stacked[f"{HF_MLP}.experts.{name}"]) for name in ("gate_up_proj", "down_proj")
        ],
        "experts_train": [_of_experts(moe, TRAIN, name) for name in (WEIGHT1, WEIGHT2)],
        "experts_infer": [_of_experts(moe, INFER, name) for name in (WEIGHT1, WEIGHT2)],
        "ranks_infer": [
            figure
            for parameter, axis in ((QKV, 0), (PROJ, 1), (FC1, 0), (FC2, 1))
            for figure in of_ranks(parameter, INFER, two, axis)
        ],
        "ranks_infer_tp8": list(of_ranks(QKV, INFER, eight)),
        "ranks_train": [figure for parameter in (QKV, FC1) for figure in of_ranks(parameter, TRAIN, two)],
        "ranks_train_contiguous": [
            figure for parameter in (QKV, FC1) for figure in of_ranks(parameter, CONTIGUOUS_2, two)
        ],
    }


def _of_experts(moe: Tiny, dialect: Dialect, name: str) -> Matrix:
    array = moe.made(dialect)[name]
    return moe.matrix(f"{name.partition('.mlp.')[2]} {array.shape}", array)


def text(shown: Iterable[Figure]) -> str:
    """A picture in letters."""
    lines = []
    for figure in shown:
        if isinstance(figure, Strip):
            step = len(figure.boxes) // figure.blocks
            blocks = [" ".join(figure.boxes[n : n + step]) for n in range(0, len(figure.boxes), step)]
            lines.append(f"{figure.title:<30} {'  '.join(blocks)}")
        else:
            rows = figure.cells.reshape(-1, figure.cells.shape[-1])
            lines += [f"{figure.title if number == 0 else '':<36} {' '.join(row)}" for number, row in enumerate(rows)]
    return "".join(f"{line}\n" for line in lines)


_HEIGHT, _GAP = 26, 10


def svg(shown: Sequence[Figure]) -> str:
    """A picture as SVG."""
    strips = [figure for figure in shown if isinstance(figure, Strip)]
    drawn = _strips(strips) if strips else _matrices([figure for figure in shown if isinstance(figure, Matrix)])
    elements, width, height = drawn
    return document(width, height, text(shown), elements)


def _strips(strips: Sequence[Strip]) -> tuple[list[str], int, int]:
    box, left = 34, LETTER_WIDTH * max(len(strip.title) for strip in strips) + _GAP
    elements = []
    for number, strip in enumerate(strips):
        y = _GAP + number * (_HEIGHT + _GAP)
        elements.append(_label(0, y, strip.title))
        for place, label in enumerate(strip.boxes):
            x = left + place * box + place * strip.blocks // len(strip.boxes) * _GAP
            elements.append(_box(x, y, box, label, _COLOURS[label[0]]))
    width = max(len(strip.boxes) * box + strip.blocks * _GAP for strip in strips)
    return elements, left + width, _GAP + len(strips) * (_HEIGHT + _GAP)


def _matrices(matrices: Sequence[Matrix]) -> tuple[list[str], int, int]:
    """Two beside each other or, where there are more, three."""
    box, columns = 46, 2 if len(matrices) == 2 else 3
    elements, y, width = [], _GAP, 0
    for start in range(0, len(matrices), columns):
        x, bottom = 0, y
        for matrix in matrices[start : start + columns]:
            elements.append(_label(x, y, matrix.title))
            below = y + _HEIGHT
            slices = matrix.cells if matrix.cells.ndim == 3 else [matrix.cells]
            for cells in slices:
                for row in cells:
                    for place, label in enumerate(row):
                        is_faint = label[0] != "0"  # of the second expert
                        elements.append(_box(x + place * box, below, box, label, _COLOURS[label[1]], is_faint))
                    below += _HEIGHT
                below += _GAP
            bottom = max(bottom, below)
            x += max(box * matrix.cells.shape[-1], LETTER_WIDTH * len(matrix.title)) + 2 * _GAP
        y, width = bottom, max(width, x)
    return elements, width, y


def _label(x: int, y: int, title: str) -> str:
    return words(x, y + 17, title)


def _box(x: int, y: int, width: int, label: str, colour: str, is_faint: bool = False) -> str:
    dashes = ' stroke-dasharray="3 2"' if is_faint else ""
    return (
        f'<rect x="{x}.5" y="{y}.5" width="{width}" height="{_HEIGHT}" fill="{colour}" stroke="{EDGE}"{dashes}/>'
        + words(x + width // 2, y + 18, label, INK, "middle")
    )


def main() -> None:
    """Writes all pictures."""
    directory = Path(__file__).resolve().parent / "pictures"
    directory.mkdir(exist_ok=True)
    for name, shown in figures().items():
        (directory / f"{name}.svg").write_text(svg(shown), encoding="utf-8")


if __name__ == "__main__":
    main()
