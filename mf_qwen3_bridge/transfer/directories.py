"""Finds what a directory lacks, and the directory that was meant by one that holds no model itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def absent_shards(files: Iterable[Path]) -> list[str]:
    """The files that a directory without an index should hold by Hugging Face's ``NAME-00001-of-00003`` and lacks."""
    present = {file.name for file in files}
    wanted = set()
    for match in filter(None, map(_SHARD.fullmatch, present)):
        stem, total = match.groups()
        wanted |= {f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)}
    return sorted(wanted - present)


def what_else_is_there(path: Path) -> str:
    """The end of a message about a directory without safetensors: what it holds instead, and what to do."""
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(kind))
    hint = f"; it holds {', '.join(pickled[:3])}: only safetensors are read" if pickled else ""
    below = sorted({file.parent.name for file in path.glob("*/*.safetensors")})
    if below and below[0].startswith("rank_"):
        hint += f"; {', '.join(below[:3])} in it do: what the ranks of a training run saved, which mf-qwen3 unify "
        return hint + "merges, given their strategy files"
    if meant := directory_meant(path, "*.safetensors"):
        return f"{hint}; give {meant}"
    return f"{hint}; {', '.join(below[:3])} in it do" if below else hint


def directory_meant(path: Path, pattern: str) -> Path | None:
    """The directory below ``path`` that holds a file of ``pattern``; None if there is none, or are several.

    In a repository of the Hub's cache, ``models--Qwen--Qwen3-8B``, it is the snapshot that ``refs/main`` names, or the
    only one; elsewhere the only directory that holds such a file.
    """
    try:
        main = path / "refs" / "main"
        revision = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
        if Path(revision).name == revision and any((path / "snapshots" / revision).glob(pattern)):
            return path / "snapshots" / revision
        for below in ("snapshots/*", "*"):
            found = {file.parent for file in path.glob(f"{below}/{pattern}")}
            if found:
                return found.pop() if len(found) == 1 else None
    except (OSError, ValueError):  # what can't be read is not what is meant
        pass
    return None
