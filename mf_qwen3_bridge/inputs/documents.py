"""Reads JSON and YAML documents into plain values, whatever they hold."""

import errno
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from mf_qwen3_bridge.errors import BridgeError

# Far more than any config has; YAML's aliases make more than that of a few lines.
_MOST_VALUES = 100_000
_LONGEST_NUMBER = 1024


def read_document(path: Path, parse: Callable[[str], Any], kind: str) -> Any:
    """What a file holds, as null, booleans, numbers, text, lists, and mappings with text for keys.

    Whatever error ``parse`` raises means that it is no document of this ``kind``, JSON or YAML.

    Raises:
        BridgeError: it can't be read, is not valid, contains itself, or holds numbers or text that nothing can print.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe might never end
            raise OSError(errno.EINVAL, "no regular file")
        return _plain(parse(path.read_text(encoding="utf-8")), count(1))
    except OSError as error:
        raise BridgeError(f"can't read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise BridgeError(f"{path} is not valid {kind}: nested too deeply, or in itself") from error
    except Exception as error:  # PyYAML lets through whatever its constructors meet: IndexError, AttributeError...
        raise BridgeError(f"{path} is not valid {kind} ({error}): copy it again, or correct it") from error


def _plain(value: Any, numbers: Iterator[int]) -> Any:
    """A copy of a value; ``numbers`` counts the values in it, those that occur several times each time.

    Raises ValueError for what can't be printed or is too much, RecursionError for what contains itself.
    """
    if next(numbers) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values")
    if isinstance(value, Mapping):
        return {_text(key): _plain(entry, numbers) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry, numbers) for entry in value]
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        raise ValueError("a number of several hundred digits")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _text(value)  # text, and YAML's dates and bytes


def _text(value: object) -> str:
    text = str(value)
    text.encode()  # JSON and YAML can both write half of a surrogate pair, which no file and no terminal takes
    return text


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
