"""The test sessions. The Makefile says which; ``nox -s "others(mindformers='1.7.0')"`` runs one."""

import os
import sys
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

# Each other release, and the tests that its session leaves out. The newest one is the newest that the package index can
# install whole: documents, their commands and the benchmarks run on it, and beside each `newest_only` stands which test
# shows the same on every release. 1.8.0 pins the MindSpore of 1.7.0; 2.0.0 and 2.1.0 run on the same one.
OTHERS = {
    "1.7.0": "newest_only",
    "1.8.0": "newest_only or mindspore_only",
    "2.0.0": "newest_only or mindspore_only",
    "2.1.0": "newest_only",
}
# MindFormers and transformers pin each other; torch is the build with which the golden results were made.
TORCH = "torch==2.13.0"
TRANSFORMERS = "transformers==4.57.1"
PEFT = "peft==0.21.2"
# A module is run by one process, as many load a network once; tests/conftest.py says which modules go first.
INTEGRATION = ("-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
INTEGRATION += ("tests/integration", "tests/distributed")


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("--quiet", "-e", ".[lint,test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python="3.11")
def format(session: nox.Session) -> None:
    """What ruff changes by itself."""
    session.install("--quiet", "-e", ".[lint]")
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")


@nox.session(python="3.11")
def unit(session: nox.Session) -> None:
    """Everything that needs no MindSpore, in an environment that has none."""
    session.install("--quiet", "-e", ".[test]")
    session.run("pytest", "-n", "2", "tests/unit", *session.posargs)


@nox.session(venv_backend="none")
def newest(session: nox.Session) -> None:
    """The real classes of the newest MindFormers release, in the environment of ``make demo``, which has it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    session.run(sys.executable, "-m", "pip", "check", external=True)
    session.run(sys.executable, *INTEGRATION, *session.posargs, env={"PATH": path}, external=True)


@nox.session(python="3.11")
@nox.parametrize("mindformers", list(OTHERS))
def others(session: nox.Session, mindformers: str) -> None:
    """The real classes of another MindFormers release, on the MindSpore that it pins, or the nearest that there is."""
    requirements = Path("requirements") / f"mindformers-{mindformers}.txt"
    if requirements.is_file():
        session.install("--quiet", "-r", str(requirements))
        session.install("--quiet", "--no-deps", f"mindformers=={mindformers}")
    else:
        session.install("--quiet", f"mindformers=={mindformers}")
    session.install("--quiet", "-e", ".[test]")  # afterwards, as on a server: it must not move anything
    if mindformers != "2.1.0":  # it pins what the package index lacks
        session.run("pip", "check")
    session.run("python", *INTEGRATION, "-m", f"not ({OTHERS[mindformers]})", *session.posargs)


@nox.session(python="3.11")
def judge(session: nox.Session) -> None:
    """What transformers, PEFT and torch say: of exports, and of the committed golden logits and tokens."""
    session.install("--quiet", TORCH, TRANSFORMERS, PEFT)
    session.install("--quiet", "-e", ".[test]")
    session.run("pytest", "tests/judge", *session.posargs)
    session.run("python", "tests/fixtures/make_fixtures.py", "--check")
    session.run("python", "tests/fixtures/make_adapters.py", "--check")  # those for this transformers
