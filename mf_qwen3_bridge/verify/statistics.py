"""Measures the values of a checkpoint: refuses invalid ones, lists outliers among tensors of the same kind."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from mf_qwen3_bridge.errors import fold_names
from mf_qwen3_bridge.inputs.identify import Weights
from mf_qwen3_bridge.model.parameters import EMBEDDING, OUTPUT
from mf_qwen3_bridge.model.rules import HF
from mf_qwen3_bridge.transfer.copying import Transfer
from mf_qwen3_bridge.transfer.plan import check_values
from mf_qwen3_bridge.transfer.progress import progress_bar
from mf_qwen3_bridge.transfer.tiles import Copy, tiles
from mf_qwen3_bridge.transfer.values import largest_magnitude

_BLOCK = 64 << 10  # elements that numpy sums accurately enough in float32, and that stay in the cache

_SQUARABLE = (1e-15, 1e15)  # magnitudes whose squares float32 represents

# Values of trained Qwen3 models are far from these limits. Norms are around 1; matrices are centred on 0.
_NORM_RMS = (1e-3, 1e3)
_MATRIX_RMS = (1e-5, 10.0)
_MATRIX_MEAN = 0.5  # of the RMS
_ZEROS, _ZEROS_OF_TOKENS = 0.01, 0.1  # of the elements
# An outlier differs from the median of its kind, over all layers, by this factor and this multiple of their spread.
_FACTOR = 4.0
_SPREADS = 8.0
_FEWEST = 5


@dataclass(frozen=True)
class Statistics:
    """Statistics of one tensor's values; all but ``size``, ``zeros`` and ``magnitude`` exclude NaN and infinity.

    ``total`` and ``squares`` are sums of the elements and of their squares.
    """

    size: int = 0
    total: float = 0.0
    squares: float = 0.0
    zeros: int = 0
    smallest: float = math.inf
    largest: float = -math.inf
    magnitude: float = 0.0  # the largest; infinity if there is an infinity or NaN

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.size + other.size,
            self.total + other.total,
            self.squares + other.squares,
            self.zeros + other.zeros,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
            max(self.magnitude, other.magnitude),
        )

    @property
    def mean(self) -> float:
        """The mean."""
        return self.total / self.size

    @property
    def rms(self) -> float:
        """The root of the mean square."""
        return math.sqrt(self.squares / self.size)


def statistics_of(array: np.ndarray) -> Statistics:
    """Computes the statistics of a float32, float16 or bfloat16 array."""
    flat = array.reshape(-1)
    found = Statistics()
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        magnitude = largest_magnitude(block)
        zeros = block.size - int(np.count_nonzero(block.view(f"u{block.itemsize}") << 1))  # without the sign
        one = Statistics(size=block.size, zeros=zeros, magnitude=magnitude)
        if math.isfinite(magnitude):
            values = block.astype(np.float32 if _SQUARABLE[0] < magnitude < _SQUARABLE[1] else np.float64)
            total, squares = float(values.sum()), float(np.dot(values, values))
            smallest, largest = float(values.min()), float(values.max())
            one = replace(one, total=total, squares=squares, smallest=smallest, largest=largest)
        found += one
    return found


def measure(weights: Weights) -> dict[str, Statistics]:
    """Computes the statistics of each tensor, under Hugging Face's names; reads every byte once.

    Raises BridgeError if the model is not whole, a tied output layer differs from the embedding, or tensors are all
    zero or contain NaN or infinity.
    """
    plan = weights.plan(HF)
    plan.check_duplicates()
    found: dict[str, Statistics] = defaultdict(Statistics)

    def look(elements_of: Mapping[Copy, np.ndarray]) -> list[tuple[str, Statistics]]:
        return [(copy.target, statistics_of(elements)) for copy, elements in elements_of.items()]

    with progress_bar("reading", plan.source_nbytes) as advance, Transfer(advance) as transfer:
        for several in transfer.each(tiles(plan.copies), look):
            for name, one in several:
                found[name] += one
    check_values({t.name: {copy.source: found[t.name].magnitude for copy in t.copies} for t in plan.targets})
    return dict(found)


def kinds(statistics: Mapping[str, Statistics]) -> dict[str, dict[str, Statistics]]:
    """Groups tensors by kind: names that differ only in the numbers of layer and expert."""
    found: dict[str, dict[str, Statistics]] = defaultdict(dict)
    for name, one in statistics.items():
        found[re.sub(r"\.\d+\.", ".*.", name)][name] = one
    return dict(found)


def rows(statistics: Mapping[str, Statistics]) -> Iterator[tuple[str, ...]]:
    """A row for each kind: name, number of tensors, RMS (least, median, greatest), mean, smallest and largest value."""
    for kind, members in kinds(statistics).items():
        several = sorted(one.rms for one in members.values())
        rms = " ".join(f"{value:.3g}" for value in (several[0], median(several), several[-1]))
        everything = sum(members.values(), Statistics())
        extremes = f"{everything.smallest:.3g} to {everything.largest:.3g}"
        yield kind, str(len(members)), rms, f"{everything.mean:.2g}", extremes


def outliers(statistics: Mapping[str, Statistics]) -> Iterator[str]:
    """A line for each unusual property of each kind of tensor."""
    for members in kinds(statistics).values():
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for name, oddity, value in (*_among_others(members), *_by_themselves(members)):
            found[oddity][name] = value
        for oddity, values in found.items():
            least, most = (f"{value:.3g}" for value in (min(values.values()), max(values.values())))
            names = ", ".join(fold_names(values))
            yield f"{names}: {oddity.format(least if least == most else f'{least} to {most}')}"


def _among_others(members: Mapping[str, Statistics]) -> Iterator[tuple[str, str, float]]:
    """Yields (name, oddity, number) for outliers among tensors of one kind."""
    if len(members) < _FEWEST:
        return
    logarithms = {name: math.log(one.rms) for name, one in members.items()}
    middle = median(logarithms.values())
    spread = median(abs(value - middle) for value in logarithms.values())
    for name, value in logarithms.items():
        if abs(value - middle) > max(math.log(_FACTOR), _SPREADS * spread):
            yield name, f"RMS {{}}; {math.exp(middle):.3g} is the median of its kind", math.exp(value)


def _by_themselves(members: Mapping[str, Statistics]) -> Iterator[tuple[str, str, float]]:
    for name, one in members.items():
        is_norm = "norm" in name
        least, most = _NORM_RMS if is_norm else _MATRIX_RMS
        if one.smallest == one.largest:
            yield name, "all elements are {}: never trained, or never loaded", one.mean
            continue
        if not least < one.rms < most:
            yield name, f"RMS {{}}; {least:g} to {most:g} is usual", one.rms
        if is_norm and one.mean < 0:
            yield name, "mean {}; norms are positive as a rule", one.mean
        if not is_norm and abs(one.mean) > _MATRIX_MEAN * one.rms:
            yield name, "mean {} of the RMS; matrices are centred on 0", one.mean / one.rms
        # Rows of unused tokens may be zero.
        usual = _ZEROS_OF_TOKENS if name in (EMBEDDING[0], OUTPUT[0]) else _ZEROS
        if one.zeros > usual * one.size:
            yield name, "{} of the elements are zero: a hole in the file?", one.zeros / one.size
