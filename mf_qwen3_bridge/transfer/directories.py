"""Finds the directory that is meant by one that holds no model itself."""

from __future__ import annotations

from pathlib import Path


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
