"""The test sessions; ``make test`` runs them all. ``nox -s "integration(mindformers='1.7.0')"`` runs one."""

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

# Each release, and the tests that its session leaves out. Documents, their commands and the benchmarks run on the
# newest one: beside each `newest_only` stands which test shows the same on every release. 1.8.0 pins the MindSpore of
# 1.7.0.
MINDFORMERS = {"1.7.0": "newest_only", "1.8.0": "newest_only or mindspore_only", "1.9.0": ""}
# MindFormers and transformers pin each other; torch is the build with which the golden results were made.
TORCH = "torch==2.13.0"
TRANSFORMERS = "transformers==4.57.1"


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("--quiet", "-e", ".[lint,test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python="3.11")
def unit(session: nox.Session) -> None:
    """Everything that needs no MindSpore, in an environment that has none."""
    session.install("--quiet", "-e", ".[test]")
    session.run("pytest", "-n", "2", "tests/unit", *session.posargs)


@nox.session(python="3.11")
@nox.parametrize("mindformers", list(MINDFORMERS))
def integration(session: nox.Session, mindformers: str) -> None:
    """The real classes of one MindFormers release, on the MindSpore it pins."""
    session.install("--quiet", f"mindformers=={mindformers}")
    session.install("--quiet", "-e", ".[test]")  # afterwards, as on a server: it must not move anything
    session.run("pip", "check")
    left_out = ("-m", f"not ({MINDFORMERS[mindformers]})") if MINDFORMERS[mindformers] else ()
    session.run(
        *("pytest", "-n", "2", "--dist", "loadfile", *left_out),
        *("tests/integration", "tests/distributed", *session.posargs),
    )


@nox.session(python="3.11")
def judge(session: nox.Session) -> None:
    """What transformers and torch say: of exports, and of the committed golden logits and tokens."""
    session.install("--quiet", TORCH, TRANSFORMERS)
    session.install("--quiet", "-e", ".[test]")
    session.run("pytest", "tests/judge", *session.posargs)
    session.run("python", "tests/fixtures/make_fixtures.py", "--check")
