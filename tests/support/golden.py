"""The committed fixtures, and what transformers computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = FIXTURES / "checkpoints"
GOLDENS = FIXTURES / "golden"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz"))
# Of logits, relative to their scale, in float32.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Golden:
    """What transformers computed for a prompt: logits float32 (len(prompt), vocab_size), and 64 greedy tokens."""

    prompt: list[int]
    logits: np.ndarray
    tokens: list[int]


def golden(name: str, directory: Path = GOLDENS) -> list[Golden]:
    with np.load(directory / f"{name}.npz") as archive:
        return [
            Golden(archive[f"prompt_{i}"].tolist(), archive[f"logits_{i}"], archive[f"tokens_{i}"].tolist())
            for i in range(sum(key.startswith("prompt") for key in archive))
        ]


# Quantised by transformers 5 and compressed-tensors; see tests/fixtures/make_quantised.py.
QUANTISED = FIXTURES / "quantised"
QUANTISED_NAMES = sorted(path.stem for path in QUANTISED.glob("*.npz"))


def digests(name: str) -> dict[str, str]:
    """The SHA-256 of each weight that the library dequantised, in bfloat16, expert by expert."""
    with np.load(QUANTISED / f"{name}.npz") as archive:
        return dict(zip(archive["names"].tolist(), archive["digests"].tolist()))
