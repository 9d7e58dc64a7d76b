"""Opens PEFT adapters: their directories as the user names them, config and header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.documents import directory_meant
from mf_qwen3_bridge.inputs.peft_config import CONFIG_FILE, PeftConfig, check_scaling, read_peft_config
from mf_qwen3_bridge.transfer.safetensors import TensorInfo, read_header

WEIGHTS_FILE = "adapter_model.safetensors"


class AdapterPath(NamedTuple):
    """An adapter as the user names it: its directory, and a factor of its update."""

    directory: Path
    scale: float = 1.0


def adapter_paths(adapters: Any) -> tuple[AdapterPath, ...]:
    """What a user names: nothing, ``DIR`` or ``DIR:SCALE``, a pair of directory and factor, or several of these.

    A name that exists as a whole is a directory, whatever it contains.

    Example:
        >>> adapter_paths(["lora", ("other", 0.5)])
        (AdapterPath(directory=PosixPath('lora'), scale=1.0), AdapterPath(directory=PosixPath('other'), scale=0.5))
    """
    if adapters is None:
        return ()
    if isinstance(adapters, str | Path):
        return (_parse(str(adapters)),)
    if isinstance(adapters, AdapterPath):
        return (adapters,)
    if isinstance(adapters, tuple) and len(adapters) == 2 and type(adapters[1]) in (int, float):
        if isinstance(adapters[0], str | Path):
            return (AdapterPath(Path(adapters[0]), float(adapters[1])),)
    elif isinstance(adapters, list | tuple):
        return tuple(path for adapter in adapters for path in adapter_paths(adapter))
    raise BridgeError(f"adapter {adapters!r}: give a directory, DIR:SCALE, (directory, factor), or a list of these")


def _parse(text: str) -> AdapterPath:
    name, colon, number = text.rpartition(":")
    if colon and name and not _exists(Path(text)):
        try:
            return AdapterPath(Path(name), float(number))
        except ValueError:
            pass
    return AdapterPath(Path(text))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter, not read yet.

    Attributes:
        path: its directory, and the factor of its update.
        config: its adapter_config.json.
        tensors: by the names in its file.
    """

    path: AdapterPath
    config: PeftConfig
    tensors: Mapping[str, TensorInfo]

    @property
    def name(self) -> str:
        """As messages call it."""
        scale = "" if self.path.scale == 1 else f", scaled by {self.path.scale:g}"
        return f"{self.path.directory}{scale}"


def open_adapter(path: AdapterPath) -> Adapter:
    """Opens an adapter by its config and its header; BridgeError if it is none, or not supported."""
    directory = path.directory
    try:
        if not directory.is_dir():
            raise BridgeError(f"the adapter {directory} is no directory: give the one that holds {CONFIG_FILE}")
    except (OSError, ValueError) as error:
        raise BridgeError(f"the adapter {directory} can't be read: {error}") from error
    if not (directory / CONFIG_FILE).is_file():
        meant = directory_meant(directory, CONFIG_FILE)
        remedy = f"give {meant}" if meant else "give the directory that PEFT saved"
        raise BridgeError(f"{directory / CONFIG_FILE} is missing: {remedy}")
    config = read_peft_config(directory)
    check_scaling(path.scale, f"{directory}: factor {path.scale}", directory)
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (directory / name).is_file()), "")
        remedy = "copy it"
        if pickled:
            remedy = f"{pickled} is not read; load it with PEFT once, and save it again (save_pretrained)"
        elif list(directory.rglob("*.safetensors")):
            remedy = "is it of a MindFormers run? mf-qwen3 export --lora adapter makes a PEFT adapter of one"
        raise BridgeError(f"{file} is missing: {remedy}")
    return Adapter(path, config, read_header(file)[0])
