"""Errors show every problem, with the names of many tensors folded."""

from mf_qwen3_bridge.errors import BridgeError, Problem, fold_names


def test_fold_names():
    names = ["a.layers.0.w", "a.layers.1.w", "a.layers.2.w", "a.layers.5.w", "norm", "a.layers.7.v"]
    assert fold_names(names[::-1]) == ["a.layers.{0..2,5}.w", "a.layers.7.v", "norm"]
    assert fold_names(["layers.3.w"]) == ["layers.3.w"]
    assert fold_names([]) == []
    experts = [f"layers.{layer}.experts.{expert}.up.weight" for layer in range(3) for expert in range(4)]
    assert fold_names(experts) == ["layers.{0..2}.experts.{0..3}.up.weight"]
    assert fold_names(experts[:4]) == ["layers.0.experts.{0..3}.up.weight"]
    assert fold_names(experts[:5]) == ["layers.{0..1}.experts.0.up.weight", "layers.0.experts.{1..3}.up.weight"]


def test_an_error_shows_every_problem():
    text = str(BridgeError("it does not fit", [Problem("a", "1\n2", "do x"), Problem("b", "3", "do y")]))
    for word in ("it does not fit", "a", "1", "2", "do x", "b", "3", "do y"):
        assert word in text
    assert str(BridgeError("alone")) == "alone"
