"""Opens a checkpoint: the one way in for every command, whoever wrote it.

Hugging Face's directories, MindFormers' merged ones and the files of a training run's ranks all become one type: the
tensors, each whole or in shards, and what the files declare of themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mf_qwen3_bridge.inputs.rank_files import open_rank_files
from mf_qwen3_bridge.inputs.source import Source
from mf_qwen3_bridge.inputs.strategies import read_strategies
from mf_qwen3_bridge.transfer.safetensors import open_checkpoint, open_files


def open_source(
    path: Path | Sequence[Path],
    strategies: Path | None = None,
    file_suffix: str | None = None,
    *,
    weights_only: bool = False,
    without_prefix: str | None = None,
) -> Source:
    """Opens a checkpoint by its headers alone.

    Args:
        path: a safetensors file, several, or a directory of them; with ``strategies`` the one that holds ``rank_0/``.
        strategies: the strategy folder of the training run whose ranks saved the files.
        file_suffix: of ranks' files, ``EPOCH_STEP`` of those to take; not needed where each rank has one file.
        weights_only: of ranks' files, leave an optimizer's state out.
        without_prefix: of ranks' files, leave out tensors whose names begin so.

    Raises:
        BridgeError: files are missing, damaged, or contradict each other; a table lists everything.

    Example:
        >>> from pathlib import Path
        >>> source = open_source(Path("demo/qwen3-demo"))
        >>> source.is_hf, source.tensors["model.norm.weight"].dtype
        (True, 'BF16')
    """
    if strategies is None:
        checkpoint = open_checkpoint(path) if isinstance(path, Path) else open_files(path[0].parent, path)
        return Source(checkpoint.path, checkpoint.tensors, checkpoint.metadata, checkpoint.contradictions)
    assert isinstance(path, Path)
    listed = read_strategies(strategies)
    return open_rank_files(path, listed, file_suffix, weights_only=weights_only, without_prefix=without_prefix)
