"""How the commands are called, and what they are given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mf_qwen3_bridge.cli.files import convert_weight
from mf_qwen3_bridge.cli.main import cli, main
from mf_qwen3_bridge.inputs import opening
from tests.support.checkpoints import Tensors, hf_config, random_tensors, write
from tests.support.cli import Call, Result
from tests.support.trained import ADAM, GROUPS, Ranks, fused, save_ranks, write_merged


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """What a crash leaves is judged in test_output.py."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def call(capsys) -> Call:
    def called(*arguments: object, command=cli) -> Result:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments], command)
        return Result(exited.value.code, *capsys.readouterr())

    return called


@pytest.fixture
def call_script(call) -> Call:
    return lambda *arguments: call(*arguments, command=convert_weight)


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    return write(tmp_path / "hf", random_tensors(GROUPS), hf_config(GROUPS), shards=3)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_merged(tmp_path / "trained", fused(random_tensors()))


@pytest.fixture
def tp2(tmp_path) -> Ranks:
    return save_ranks(tmp_path / "ranks", fused(random_tensors()))


@pytest.fixture
def with_adam(tmp_path) -> tuple[Ranks, Tensors]:
    """A run of two ranks with its optimizer's state, and its whole tensors."""
    whole = fused(random_tensors())
    whole |= {f"{moment}.{name}": array + 1 for name, array in whole.items() for moment in ADAM}
    return save_ranks(tmp_path / "ranks", whole), whole


@pytest.fixture
def strategies_of(monkeypatch) -> Callable[[Ranks], None]:
    """Strategy files, without the MindSpore that reads them."""

    def read_so(ranks: Ranks) -> None:
        monkeypatch.setattr(opening, "read_strategies", lambda directory: ranks.strategies)

    return read_so
