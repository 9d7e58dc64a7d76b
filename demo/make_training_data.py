#!/usr/bin/env python3
"""Makes up training data for a tiny model: a short sequence of tokens, repeated; rows begin at different places.

python demo/make_training_data.py --model_dir demo/qwen3-demo --output output/training.mindrecord
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from mindspore.mindrecord import FileWriter

from mf_qwen3_bridge.inputs.hf_config import read_hf_config


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="its config.json says how many tokens there are")
    parser.add_argument("--output", type=Path, required=True, help="a mindrecord file; an older one is replaced")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--seq_length", type=int, default=32)
    arguments = parser.parse_args()

    random = np.random.default_rng(0)
    tune = random.integers(1, read_hf_config(arguments.model_dir)["vocab_size"], arguments.seq_length // 4)
    starts = random.integers(len(tune), size=arguments.rows)
    songs = [np.resize(np.roll(tune, start), arguments.seq_length + 1).astype(np.int32) for start in starts]

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    writer = FileWriter(str(arguments.output), shard_num=1, overwrite=True)
    column = {"type": "int32", "shape": [-1]}
    writer.add_schema({"input_ids": column, "labels": column}, "one tune")
    writer.write_raw_data([{"input_ids": song[:-1], "labels": song[1:]} for song in songs])
    writer.commit()


if __name__ == "__main__":
    main()
