"""``mf-qwen3 verify A B``: what is equal is found equal in any two dialects, and each mutation is found and named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mf_qwen3_bridge.cli.main import cli
from mf_qwen3_bridge.convert.jobs import to_hf, to_mindformers
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.identify import open_weights
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_trained
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.rules import INFER, TRAIN, Dialect
from mf_qwen3_bridge.transfer.safetensors import Reader
from mf_qwen3_bridge.verify.comparison import compare
from tests.support.checkpoints import MOE_SPEC, SPEC, contents, hf_config, random_tensors, write

TIED = replace(SPEC, tie_word_embeddings=True)
SQUARE = replace(MOE_SPEC, moe_ffn_hidden_size=MOE_SPEC.hidden_size)
DIALECTS = [TRAIN, INFER, Dialect(Layout(True, False)), Dialect(Layout(False, True))]


def dialects_of(directory: Path, spec, tensors=None) -> dict[str, Path]:
    """One model in all dialects."""
    hf = write(directory / "hf", tensors or random_tensors(spec), hf_config(spec))
    paths = {"hf": hf}
    for dialect in DIALECTS:
        paths[str(dialect)] = directory / str(dialect).replace(" ", "_").replace("/", "_")
        run(to_mindformers(check(hf), dialect, paths[str(dialect)]))
    return paths


@pytest.mark.parametrize("spec", [SPEC, TIED, MOE_SPEC], ids=["dense", "tied", "moe"])
def test_the_same_weights_in_any_two_dialects(tmp_path: Path, spec):
    paths = dialects_of(tmp_path, spec)
    for left, right in itertools.product(paths.values(), repeat=2):
        report = compare(open_weights(left), open_weights(right))
        assert report.is_equal, (left, right, list(report.problems()))
        assert report.nbytes == sum(tensor.nbytes for tensor in open_weights(left).source.tensors.values())


def test_each_byte_is_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    paths = dialects_of(tmp_path, MOE_SPEC)
    read = []
    original = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda self, t, start, out: (read.append(len(out)), original(self, t, start, out))
    )
    left, right = open_weights(paths["hf"]), open_weights(paths[str(TRAIN)])
    compare(left, right)
    assert sum(read) == left.source.nbytes + right.source.nbytes


Q, K, V = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
GATE, UP = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


def swapped(one: str, other: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def zeroed(tensors: dict[str, np.ndarray]) -> None:
    tensors[Q] = np.zeros_like(tensors[Q])


def a_row_off(tensors: dict[str, np.ndarray]) -> None:
    tensors[Q] = np.roll(tensors[Q], 1, axis=0)


def one_bit(tensors: dict[str, np.ndarray]) -> None:
    tensors[V] = tensors[V].copy()
    tensors[V].reshape(-1).view(np.uint8)[-1] ^= 1


def transposed(tensors: dict[str, np.ndarray]) -> None:
    name = EXPERT.format(2, "down")
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def regrouped(tensors: dict[str, np.ndarray]) -> None:
    """The query heads assigned to KV groups of which there are twice as many, or half."""
    heads = tensors[Q].reshape(SPEC.num_query_groups, -1, SPEC.head_dim, SPEC.hidden_size)
    tensors[Q] = np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(tensors[Q].shape)


MUTATIONS = {
    "wrong group count": (SPEC, regrouped, {Q}, "another number of KV groups"),
    "k and v swapped": (SPEC, swapped(K, V), {K, V}, "swapped"),
    "gate and up swapped": (SPEC, swapped(GATE, UP), {GATE, UP}, "swapped"),
    "a tensor zeroed": (SPEC, zeroed, {Q}, "zero in the second"),
    "a row off": (SPEC, a_row_off, {Q}, "rows are off by 1"),
    "one bit": (SPEC, one_bit, {V}, ""),
    "experts' gate and up swapped": (
        MOE_SPEC,
        swapped(EXPERT.format(1, "gate"), EXPERT.format(1, "up")),
        {EXPERT.format(1, "gate"), EXPERT.format(1, "up")},
        "swapped",
    ),
    "experts swapped": (
        MOE_SPEC,
        swapped(EXPERT.format(0, "gate"), EXPERT.format(3, "gate")),
        {EXPERT.format(0, "gate"), EXPERT.format(3, "gate")},
        "expert",
    ),
    "a square expert transposed": (SQUARE, transposed, {EXPERT.format(2, "down")}, "transposed"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_found_and_named(tmp_path: Path, mutation: str):
    spec, change, names, guess = MUTATIONS[mutation]
    tensors = random_tensors(spec)
    paths = dialects_of(tmp_path / "right", spec, tensors)
    wrong = dict(tensors)
    change(wrong)
    mutant = write(tmp_path / "wrong", wrong, hf_config(spec))
    for path in paths.values():
        report = compare(open_weights(path), open_weights(mutant))
        assert set(report.different) == names
        assert all(guess in report.suggestions.get(name, "") for name in names), report.suggestions


@pytest.mark.parametrize(
    "wrong", [Layout(False, True), Layout(True, False), Layout(False, False), Layout(False, False, 2)], ids=str
)
def test_a_wrong_layout_is_recognised(tmp_path: Path, wrong: Layout):
    """Files with the wrong layout metadata: as if somebody had undone, or not undone, the interleaving."""
    hf = write(tmp_path / "hf", random_tensors(), hf_config())
    contiguous = {t.name: t.make() for t in check(hf).plan(Dialect(wrong)).targets}
    other = write(tmp_path / "contiguous", contiguous)  # assumed to be interleaved
    report = compare(open_weights(hf), open_weights(other))
    assert report.different
    kinds = {name.rsplit(".", 2)[1] for name in report.different}
    expected = set() if wrong.interleaved_qkv else {"q_proj", "k_proj", "v_proj"}
    expected |= set() if wrong.interleaved_gate_up else {"gate_proj", "up_proj"}
    assert kinds <= expected
    assert report.suggestions.keys() == report.different.keys()
    for name, suggestion in report.suggestions.items():
        flag = wrong.interleaved_qkv if "self_attn" in name else wrong.interleaved_gate_up
        blocks = "" if wrong.tensor_parallel == 1 else " in the blocks of 2 tensor parallel ranks"
        assert not flag
        assert suggestion.startswith(f"the second is laid out contiguous{blocks}, not interleaved")


@pytest.mark.parametrize("stored", [Layout(False, False), Layout(False, False, 2)], ids=str)
def test_an_export_in_the_wrong_layout_is_named(tmp_path: Path, stored: Layout):
    """The mistake that this project exists for: contiguous weights, exported as if they were interleaved."""
    hf = write(tmp_path / "hf", random_tensors(), hf_config())
    run(to_mindformers(check(hf), Dialect(stored), tmp_path / "trained"))
    undeclared = write(tmp_path / "undeclared", contents(tmp_path / "trained"))
    run(to_hf(check_trained(open_source(undeclared), hf), tmp_path / "exported", "fp32"))
    report = compare(open_weights(hf), open_weights(tmp_path / "exported"))
    assert report.suggestions.keys() == report.different.keys()
    assert {name.split(".")[-2] for name in report.different} <= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    blocks = "" if stored.tensor_parallel == 1 else " in the blocks of 2 tensor parallel ranks"
    for suggestion in report.suggestions.values():
        assert f"wrong layout: read as interleaved, stored contiguous{blocks} " in suggestion
        assert "--config" in suggestion
    (problem, *_) = report.problems()
    assert problem.remedy


def test_another_number_of_groups(tmp_path: Path):
    """The product of heads and their size is the same."""
    hf = write(tmp_path / "hf", random_tensors(), hf_config())
    other = replace(SPEC, num_query_groups=2 * SPEC.num_query_groups)
    with pytest.raises(BridgeError, match="num_query_groups"):
        compare(open_weights(hf), open_weights(write(tmp_path / "other", random_tensors(other), hf_config(other))))


def test_dtypes(tmp_path: Path):
    tensors = random_tensors(dtype="BF16")
    wide = {name: value.astype(np.float32) for name, value in tensors.items()}
    left, right = write(tmp_path / "left", tensors), write(tmp_path / "right", wide)
    report = compare(open_weights(left), open_weights(right))
    assert (list(report.dtypes), dict(report.different)) == ([("BF16", "F32")], {})
    assert not report.is_equal


def test_the_command(tmp_path: Path):
    paths = dialects_of(tmp_path / "right", SPEC)
    result = CliRunner().invoke(cli, ["verify", str(paths["hf"]), str(paths[str(INFER)])])
    assert result.exit_code == 0
    assert "bit for bit" in result.output
    tensors = random_tensors()
    swapped(K, V)(tensors)
    mutant = write(tmp_path / "wrong", tensors, hf_config())
    result = CliRunner().invoke(cli, ["verify", str(paths["hf"]), str(mutant)])
    assert isinstance(result.exception, BridgeError)
    assert "self_attn.k_proj" in str(result.exception) and "swapped" in str(result.exception)


def test_one_ties_its_output_layer_and_the_other_does_not(tmp_path: Path):
    tied = {name: t for name, t in random_tensors().items() if name != "lm_head.weight"}
    with pytest.raises(BridgeError) as error:
        compare(
            open_weights(write(tmp_path / "untied", random_tensors())), open_weights(write(tmp_path / "tied", tied))
        )
    assert [(problem.subject, problem.found) for problem in error.value.problems] == [
        ("output layer", f"{tmp_path / 'untied'}: its own, which is not its embedding\nthe other: none")
    ]


def test_a_norm_is_not_taken_for_another_by_its_first_elements(tmp_path: Path):
    tensors = random_tensors()
    q, k = (f"model.layers.0.self_attn.{name}_norm.weight" for name in "qk")
    tensors[k] = tensors[q].copy()
    tensors[k][-1] += 1
    wrong = tensors | {q: tensors[k]}
    report = compare(open_weights(write(tmp_path / "right", tensors)), open_weights(write(tmp_path / "wrong", wrong)))
    assert set(report.different) == {q} and "swapped" in report.suggestions[q]  # all elements are those of the other
    wrong = tensors | {q: np.append(tensors[k][:-1], np.float32(7))}
    report = compare(open_weights(write(tmp_path / "right", tensors)), open_weights(write(tmp_path / "other", wrong)))
    assert set(report.different) == {q} and not report.suggestions


def test_the_side_with_layout_metadata_is_trusted(tmp_path: Path):
    hf = write(tmp_path / "hf", random_tensors(), hf_config())
    run(to_mindformers(check(hf), INFER, tmp_path / "declared"))
    contiguous = {t.name: t.make() for t in check(hf).plan(Dialect(Layout(False, False))).targets}
    declared, undeclared = open_weights(tmp_path / "declared"), open_weights(write(tmp_path / "contiguous", contiguous))
    assert all("second is laid out" in guess for guess in compare(declared, undeclared).suggestions.values())
    assert all("first is laid out" in guess for guess in compare(undeclared, declared).suggestions.values())


def test_training_state_is_not_compared_and_that_is_reported(tmp_path: Path):
    hf = write(tmp_path / "hf", random_tensors(), hf_config())
    trained = {target.name: target.make() for target in check(hf).plan(TRAIN).targets}
    state = {"adam_m.decoder.final_layernorm.weight": np.ones(SPEC.hidden_size, np.float32)}
    saved = write(tmp_path / "saved", trained | state)
    result = CliRunner().invoke(cli, ["verify", str(hf), str(saved)])
    assert result.exit_code == 0
    assert "1 tensors are state of a training run, and not compared: adam_m" in result.output
