"""A directory that is there whole or not at all, whatever happens while it is made."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tqdm import tqdm

from mf_qwen3_bridge.convert import workers
from mf_qwen3_bridge.convert.file_writing import DIRECT_VARIABLE
from mf_qwen3_bridge.convert.jobs import to_hf, to_mindformers
from mf_qwen3_bridge.convert.run import Job, run
from mf_qwen3_bridge.convert.workers import ALONE, Worker, this_worker
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_trained
from mf_qwen3_bridge.model.rules import TRAIN
from tests.support.checkpoints import SPEC, assert_same, contents, hf_config, random_tensors, write

# Its thread may hold a lock when a test forks, and the child would wait for it for ever.
tqdm.monitor_interval = 0
LARGER = replace(SPEC, hidden_size=256, ffn_hidden_size=2048, vocab_size=4096)
Dirs = namedtuple("Dirs", "hf trained")


@pytest.fixture(scope="module")
def dirs(tmp_path_factory) -> Dirs:
    directory = tmp_path_factory.mktemp("source")
    hf = write(directory / "hf", random_tensors(LARGER), hf_config(LARGER), shards=2)
    return Dirs(hf, write(directory / "trained", random_tensors(LARGER, TRAIN)))


def job_of(dirs: Dirs, out: Path, shard_bytes: int = 3 << 20) -> Job:
    """Several files, config.json, index."""
    return to_hf(check_trained(open_source(dirs.trained), dirs.hf), out, "bf16", shard_bytes)


def in_child(work: Callable[[], object]) -> int:
    """Starts a process that does the work; exit code 1 if it raises."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # never for ever
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_nothing_loads(out: Path) -> None:
    """What a kill leaves: nothing, or a directory that nobody takes for a checkpoint."""
    for directory in (out, out.with_name(f"{out.name}.incomplete")):
        with pytest.raises(BridgeError):
            open_source(directory)


@contextmanager
def counted_steps(last: int | None) -> Iterator[list[str]]:
    """Notes each call that changes the disk; kills the process at call ``last``."""
    steps: list[str] = []

    def watch(owner, name):
        original = getattr(owner, name)

        def step(*arguments, **options):
            steps.append(name)
            if len(steps) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        patch.setattr(owner, name, step)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "pwrite"), (os, "fsync"), (os, "ftruncate"), (os, "mkdir"), (os, "rmdir")):
            watch(owner, name)
        for name in ("rename", "mkdir", "unlink"):
            watch(Path, name)
        watch(os, "unlink")
        yield steps


@pytest.fixture(params=["direct", "buffered"])
def way(request, monkeypatch) -> str:
    """Past the page cache or through it, wherever a file system takes both."""
    if request.param == "buffered":
        monkeypatch.setenv(DIRECT_VARIABLE, "0")
    return request.param


def test_killed_at_every_step(dirs, tmp_path, way):
    """Before each single change of the disk: the same command finishes what was begun, to the same bits."""
    with counted_steps(None) as steps:
        run(job_of(dirs, tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    assert len(steps) > 40

    def work(out, last):
        with counted_steps(last):
            run(job_of(dirs, out))

    for last in range(1, len(steps) + 1):
        out = tmp_path / "killed"
        assert exit_code(in_child(lambda last=last, out=out: work(out, last))) == -signal.SIGKILL
        if not out.exists():
            assert_nothing_loads(out)
            run(job_of(dirs, out))
        assert_same_directory(out, tmp_path / "whole")
        assert_same(contents(out), expected)
        assert not out.with_name("killed.incomplete").exists()
        shutil.rmtree(out)


def assert_same_directory(left: Path, right: Path) -> None:
    files = {path.name: path.read_bytes() for path in left.iterdir() if path.is_file()}
    assert files == {path.name: path.read_bytes() for path in right.iterdir() if path.is_file()}


def test_killed_in_the_middle_of_fifty_random_writes(dirs, tmp_path, way):
    """A part of what was to be written is on disk."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    moments = random.Random(seed)
    with counted_steps(None) as steps:
        run(job_of(dirs, tmp_path / "whole"))

    def work(out: Path, last: int, share: float) -> None:
        original, numbers = os.pwrite, itertools.count(1)

        def pwrite(descriptor, data, offset):
            if next(numbers) == last:
                with suppress(OSError):  # past the page cache only whole blocks are written
                    original(descriptor, data[: int(share * len(data))], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(descriptor, data, offset)

        os.pwrite = pwrite
        run(job_of(dirs, out))

    for number in range(50):
        out = tmp_path / f"killed{number}"
        last, share = moments.randint(1, steps.count("pwrite")), moments.random()
        child = in_child(lambda out=out, last=last, share=share: work(out, last, share))
        assert exit_code(child) == -signal.SIGKILL
        assert_nothing_loads(out)
        run(job_of(dirs, out))
        assert_same_directory(out, tmp_path / "whole")
        shutil.rmtree(out)


def test_what_was_damaged_in_between_is_written_again(dirs, tmp_path):
    run(job_of(dirs, tmp_path / "whole"))
    out = tmp_path / "out"

    def work():
        with counted_steps(24):
            run(job_of(dirs, out))

    assert exit_code(in_child(work)) == -signal.SIGKILL
    partial = max((tmp_path / "out.incomplete").glob("*.partial"), key=lambda path: path.stat().st_size)
    data = bytearray(partial.read_bytes())
    data[len(data) // 2] ^= 1
    partial.write_bytes(data)
    run(job_of(dirs, out))
    assert_same_directory(out, tmp_path / "whole")


def test_what_is_there_is_not_written_again(dirs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with counted_steps(None) as steps:
        run(job_of(dirs, out))
    writes = steps.count("pwrite")
    out.rename(tmp_path / "out.incomplete")
    directory = job_of(dirs, out).directory()
    state = tmp_path / "out.incomplete" / ".mf-qwen3"
    state.mkdir()
    (state / "job.json").write_text(directory._job)
    with counted_steps(None) as steps:
        run(job_of(dirs, out))
    assert steps.count("pwrite") == len(directory.files) < writes  # the headers


def refusal(job: Job, worker: Worker = ALONE) -> str:
    with pytest.raises(BridgeError) as error:
        run(job, worker)
    return str(error.value)


def test_places_that_are_taken(dirs, tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("mine")
    assert "is not empty, and nothing is overwritten" in refusal(job_of(dirs, full))
    assert [path.name for path in full.iterdir()] == ["precious"]
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is not a directory" in refusal(job_of(dirs, file))
    link = tmp_path / "link"
    link.symlink_to(full)
    assert "is not a directory" in refusal(job_of(dirs, link))
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: True)
        assert "where a disk is mounted" in refusal(job_of(dirs, tmp_path / "mounted"))
    assert file.read_text() == "mine"
    stranger = tmp_path / "out.incomplete"
    stranger.mkdir()
    (stranger / "precious").write_text("mine")
    assert "the bridge did not make it" in refusal(job_of(dirs, tmp_path / "out"))
    assert not list(tmp_path.glob("*.incomplete.*"))


def test_an_empty_directory_is_no_obstacle(dirs, tmp_path):
    (tmp_path / "out").mkdir()
    run(job_of(dirs, tmp_path / "out"))
    assert len(contents(tmp_path / "out")) == 25


def test_only_the_same_job_goes_on(dirs, tmp_path):
    out = tmp_path / "out"

    def work():
        with counted_steps(12):
            run(job_of(dirs, out))

    assert exit_code(in_child(work)) == -signal.SIGKILL
    assert "left by a command with other input or options" in refusal(to_mindformers(check(dirs.hf), TRAIN, out))
    assert "(not the same: other files, tensors)" in refusal(job_of(dirs, out, shard_bytes=1 << 20))
    os.utime(dirs.trained / "model.safetensors")
    assert "(not the same: sources)" in refusal(job_of(dirs, out))
    shutil.rmtree(tmp_path / "out.incomplete")
    run(job_of(dirs, out))


def test_two_at_a_time(dirs, tmp_path):
    first, second = job_of(dirs, tmp_path / "out").directory(), job_of(dirs, tmp_path / "out")
    with first.opened():
        assert "another process is writing" in refusal(second)


def test_the_refused_one_of_two_leaves_nothing(dirs, tmp_path):
    """Both begin in one instant, before either has written anything."""
    out = tmp_path / "out"
    first, second = job_of(dirs, out).directory(), to_mindformers(check(dirs.hf), TRAIN, out).directory()
    with second.opened(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(first, "check", lambda: None)  # as if it had looked before the other began
        with pytest.raises(BridgeError, match="another process is writing"), first.opened():
            pass
    run(to_mindformers(check(dirs.hf), TRAIN, out))
    assert out.is_dir()


def test_a_job_that_another_finished_meanwhile(dirs, tmp_path):
    out = tmp_path / "out"
    late = job_of(dirs, out).directory()
    run(job_of(dirs, out))
    expected = contents(out)
    with pytest.MonkeyPatch.context() as patch:
        original, calls = late.check, []
        patch.setattr(late, "check", lambda: calls.append(None) if not calls else original())
        with pytest.raises(BridgeError, match="is not empty"), late.opened():
            pass
    assert_same(contents(out), expected)
    assert not (tmp_path / "out.incomplete").exists()


def test_no_file_is_open_when_the_state_is_removed(dirs, tmp_path, monkeypatch):
    """On NFS a removed file that is open stays, under another name, and so does its directory."""
    original, opened = shutil.rmtree, []

    def rmtree(path, *arguments, **options):
        links = (str(link.readlink()) for link in list(Path("/proc/self/fd").iterdir()) if link.is_symlink())
        opened.extend(link for link in links if ".mf-qwen3" in link)
        return original(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    run(job_of(dirs, tmp_path / "out"))
    assert opened == []


def test_a_state_that_can_not_be_removed(dirs, tmp_path, monkeypatch):
    """What was made is whole all the same."""
    run(job_of(dirs, tmp_path / "whole"))

    def rmtree(path, *arguments, **options):
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    summary = run(job_of(dirs, tmp_path / "out"))
    assert_same_directory(tmp_path / "out", tmp_path / "whole")
    (note,) = (line for line in summary.lines() if line.startswith("note"))
    assert str(tmp_path / "out" / ".mf-qwen3") in note and "Directory not empty" in note


def test_a_disk_that_is_too_small(dirs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 20))
    assert "are needed" in refusal(job_of(dirs, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(dirs, tmp_path, monkeypatch):
    """Another program takes the room while the job runs."""
    original, calls = os.pwrite, []

    def pwrite(descriptor, data, offset):
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return original(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        text = refusal(job_of(dirs, tmp_path / "out"))
    assert "No space left on device; make room, and give the same command again: it goes on" in text
    assert_nothing_loads(tmp_path / "out")
    run(job_of(dirs, tmp_path / "out"))
    assert len(contents(tmp_path / "out")) == 25


def test_a_disk_that_takes_a_part(dirs, tmp_path, monkeypatch):
    """As a full one does, without an error: the rest is written, of a header too."""
    original = os.pwrite
    run(job_of(dirs, tmp_path / "whole"))
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: original(file, data[: 1 + len(data) // 2], offset))
    run(job_of(dirs, tmp_path / "out"))
    assert_same_directory(tmp_path / "out", tmp_path / "whole")


def test_nothing_is_written_in_a_dry_run(dirs, tmp_path):
    job_of(dirs, tmp_path / "out").directory().check()
    assert not list(tmp_path.iterdir())


def test_two_workers(dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_BEAT_SECONDS", 0.05)
    run(job_of(dirs, tmp_path / "whole"))
    job = job_of(dirs, tmp_path / "out")
    children = [in_child(lambda number=number: run(job, Worker(number, 2))) for number in (1, 0)]
    assert [exit_code(child) for child in children] == [0, 0]
    assert_same_directory(tmp_path / "out", tmp_path / "whole")


def test_each_worker_writes_its_share(dirs, tmp_path):
    shares = []
    for number in range(3):
        job = job_of(dirs, tmp_path / f"out{number}")
        with counted_steps(None) as steps, job.directory(Worker(number, 3)).opened():
            from mf_qwen3_bridge.convert.run import _write

            directory = job.directory(Worker(number, 3))
            _write(job, directory)
            shares.append(steps.count("pwrite"))
    whole = job_of(dirs, tmp_path / "whole")
    with counted_steps(None) as steps:
        run(whole)
    assert sum(shares) == steps.count("pwrite") - len(whole.directory().files)
    assert min(shares) > 0


def test_a_dead_worker_is_noticed_and_the_rest_is_done(dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 1.0)
    out = tmp_path / "out"
    job = job_of(dirs, out)

    def dies():
        with counted_steps(8):
            run(job, Worker(1, 2))

    child = in_child(dies)
    text = refusal(job, Worker(0, 2))
    assert exit_code(child) == -signal.SIGKILL
    assert "worker 1 of 2 has sent no heartbeat" in text
    assert_nothing_loads(out)
    children = [in_child(lambda number=number: run(job, Worker(number, 2))) for number in (0, 1)]
    assert [exit_code(child) for child in children] == [0, 0]
    run(job_of(dirs, tmp_path / "whole"))
    assert_same_directory(out, tmp_path / "whole")


def test_a_worker_that_fails_tells_the_others(dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_BEAT_SECONDS", 0.05)
    job = job_of(dirs, tmp_path / "out")

    def fails():
        def pwrite(*arguments):
            raise OSError(5, "Input/output error")

        time.sleep(0.5)
        os.pwrite = pwrite
        run(job, Worker(1, 2))

    child = in_child(fails)
    assert "worker 1 of 2 failed" in (text := refusal(job, Worker(0, 2)))
    assert "Input/output error" in text
    assert exit_code(child) == 1


def test_what_workers_saw_is_put_together(dirs, tmp_path, monkeypatch):
    """Half of a tensor may be empty; all of it may not, whoever read it."""
    monkeypatch.setattr(workers, "_BEAT_SECONDS", 0.05)
    tensors = random_tensors(LARGER, TRAIN)
    tensors["embedding.word_embeddings.weight"][: LARGER.vocab_size // 2] = 0
    tensors["decoder.layers.1.mlp.linear_fc2.weight"][...] = 0
    trained = write(tmp_path / "trained", tensors)
    job = to_hf(check_trained(open_source(trained), dirs.hf), tmp_path / "out", "bf16")
    child = in_child(lambda: run(job, Worker(1, 2)))
    text = refusal(job, Worker(0, 2))
    exit_code(child)
    assert "model.layers.1.mlp.down_proj.weight" in text
    assert "embed_tokens" not in text


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        ({"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2"}, None),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "MS_NODE_ID": "3"}, Worker(3, 4)),
    ],
)
def test_the_worker_that_msrun_declares(monkeypatch, environment, expected):
    for name in ("MS_ROLE", "MS_WORKER_NUM", "MS_NODE_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert this_worker() == expected


def test_a_worker_without_a_number(monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    monkeypatch.delenv("MS_NODE_ID", raising=False)
    with pytest.raises(BridgeError, match="--node_rank"):
        this_worker()
