"""Weights that are slightly wrong: the comparison with upstream and the golden logits must see every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import mf_qwen3_bridge
from mf_qwen3_bridge.inputs import identify
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.source import LAYOUT_KEY
from mf_qwen3_bridge.model import layouts
from mf_qwen3_bridge.model.layouts import by_expert
from mf_qwen3_bridge.model.rules import HF, TRAIN, Rule, model_rules
from tests.support.checkpoints import write
from tests.support.golden import CHECKPOINTS, TOLERANCE, golden
from tests.support.mutations import MOE_MUTATIONS, MUTATIONS
from tests.support.networks import bits, changed, logits_error


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        *((name, mutation) for name in ("untied_fp32", "tied_bf16") for mutation in MUTATIONS),
        *(("moe_square", mutation) for mutation in MOE_MUTATIONS),
        *(("moe_square", mutation) for mutation in ("k and v swapped", "QKV interleaved", "one tensor zeroed")),
    ],
)
def test_every_mutation_is_seen(network_of, name, mutation):
    network = network_of(name)
    right, expected = bits(network), golden(name)[-1:]
    assert logits_error(network, expected) < TOLERANCE

    parameter, change = (MUTATIONS | MOE_MUTATIONS)[mutation]
    spec = check(CHECKPOINTS / name).spec
    with changed(network, parameter, lambda weight: change(weight, spec)):
        assert bits(network) != right
        assert logits_error(network, expected) > 100 * TOLERANCE
    assert bits(network) == right


def swapped(first: int, second: int, fuses: str) -> Callable[[Iterator[Rule]], Iterator[Rule]]:
    """A rule table in which two parts of a fused parameter have changed places."""

    def change(rules: Iterator[Rule]) -> Iterator[Rule]:
        for rule in rules:
            if getattr(rule, "fuses", None) == fuses:
                tensors = list(rule.tensors)
                tensors[first], tensors[second] = tensors[second], tensors[first]
                rule = replace(rule, tensors=tuple(tensors))
            yield rule

    return change


def twice_the_groups(rules: Iterator[Rule]) -> Iterator[Rule]:
    for rule in rules:
        yield replace(rule, groups=2 * rule.groups) if getattr(rule, "fuses", None) == "qkv" else rule


@pytest.mark.parametrize(
    ("change", "dialect"),
    [(swapped(1, 2, "qkv"), HF), (swapped(0, 1, "gate_up"), HF), (twice_the_groups, TRAIN)],
    ids=["k and v swapped", "gate and up swapped", "wrong group count"],
)
def test_a_mistake_in_the_rules_is_seen_by_the_other_loaders(monkeypatch, tmp_path: Path, change, dialect):
    directory = CHECKPOINTS / "untied_fp32"
    network = mf_qwen3_bridge.from_pretrained(directory, use_training_conversion=True)
    tensors = {target.name: target.make() for target in check(directory).plan(dialect).targets}
    weights = write(tmp_path, tensors, metadata={} if dialect.is_hf else {LAYOUT_KEY: str(dialect.layout)})

    monkeypatch.setattr(identify, "model_rules", lambda spec: change(model_rules(spec)))
    mistaken = mf_qwen3_bridge.from_pretrained(directory, load_checkpoint=weights)  # no shape tells
    assert bits(mistaken) != bits(network)
    assert logits_error(mistaken, golden("untied_fp32")) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "mistake",
    [
        lambda count, rows, columns, transposed: by_expert(count, rows, columns, not transposed),
        lambda count, rows, columns, transposed: by_expert(count, rows, columns, transposed)[::-1],
        lambda count, rows, columns, transposed: [e[::-1] for e in by_expert(count, rows, columns, transposed)],
    ],
    ids=["not transposed", "experts in reverse", "up before gate"],
)
def test_a_mistake_in_the_layout_of_experts_is_seen_by_the_other_loaders(monkeypatch, mistake):
    directory = CHECKPOINTS / "moe_square"
    network = mf_qwen3_bridge.from_pretrained(directory, use_training_conversion=True)
    monkeypatch.setattr(layouts, "by_expert", mistake)
    mistaken = mf_qwen3_bridge.from_pretrained(directory)
    assert bits(mistaken) != bits(network)
    assert logits_error(mistaken, golden("moe_square")) > 100 * TOLERANCE


def test_a_mistake_in_the_layout_is_seen_by_the_other_loaders(monkeypatch):
    directory = CHECKPOINTS / "untied_fp32"
    network = mf_qwen3_bridge.from_pretrained(directory, use_training_conversion=True)
    monkeypatch.setattr(layouts, "contiguous", layouts.interleaved)
    mistaken = mf_qwen3_bridge.from_pretrained(directory)
    assert bits(mistaken) != bits(network)
    assert logits_error(mistaken, golden("untied_fp32")) > 100 * TOLERANCE
