"""config.json x YAML x tensors: what does not fit is reported once, with what to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import yaml
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.preflight import check
from mf_qwen3_bridge.inputs.source import LAYOUT_KEY
from mf_qwen3_bridge.inputs.summary import summary
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import HF, INFER, TRAIN, Dialect
from tests.support.checkpoints import MOE_SPEC, SPEC, hf_config, random_tensors, write


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(tmp_path / "hf", random_tensors(), hf_config(), shards=2)


def yaml_file(path: Path, run_mode: str = "predict", **model_config) -> Path:
    path.write_text(yaml.safe_dump({"run_mode": run_mode, "model": {"model_config": model_config}}))
    return path


def problems(*args, **kwargs):
    with pytest.raises(BridgeError) as error:
        check(*args, **kwargs)
    return {problem.subject: problem for problem in error.value.problems}


def test_what_fits_fits(directory: Path, tmp_path: Path):
    model = check(directory, yaml_file(tmp_path / "p.yaml", num_layers=2, hidden_size=12, params_dtype="bfloat16"))
    assert model.spec == SPEC
    assert model.dialect == HF
    assert model.options == {"params_dtype": "bfloat16"}
    text = "\n".join(summary(model))
    assert "25 tensors become 19 MindFormers parameters" in text


def test_the_hidden_size_of_another_model(directory: Path):
    """SPEC A.2, in small: the tensors are 12 wide, config.json says 8."""
    write(directory, {}, hf_config(hidden_size=8), shards=1)
    (directory / "model.safetensors").unlink()
    found = problems(directory)
    assert list(found) == ["hidden_size"]  # one row, not one for each of 25 tensors
    assert "config.json: 8" in found["hidden_size"].found
    assert "weights: 12 (model.embed_tokens.weight (16, 12))" in found["hidden_size"].found
    assert "set hidden_size to 12 in config.json" in found["hidden_size"].remedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("hidden_size", 16),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("num_key_value_heads", 1),
        ("head_dim", 8),
        ("head_dim", 2),
        ("intermediate_size", 8),
        ("vocab_size", 15),
    ],
)
@pytest.mark.parametrize("dialect", [HF, INFER, TRAIN])
def test_each_wrong_number_is_named_alone(tmp_path: Path, field, value, dialect):
    metadata = {} if dialect.is_hf else {LAYOUT_KEY: str(dialect.layout)}
    write(tmp_path, random_tensors(dialect=dialect), hf_config(**{field: value}), metadata=metadata)
    assert list(problems(tmp_path)) == [field]


def test_wrong_in_yaml_and_as_argument(directory: Path, tmp_path: Path):
    config = yaml_file(tmp_path / "predict.yaml", hidden_size=16, kv_channels=2, n_kv_heads=2)
    found = problems(directory, config, overrides={"num_layers": 4})
    assert list(found) == ["num_hidden_layers", "hidden_size", "head_dim"]
    assert f"set kv_channels to 4 in {config}" in found["head_dim"].remedy
    assert "set num_layers to 2 in arguments" in found["num_hidden_layers"].remedy


def test_tying_of_which_only_the_yaml_knows(directory: Path, tmp_path: Path):
    assert list(problems(directory, yaml_file(tmp_path / "p.yaml", tie_word_embeddings=True))) == [
        "tie_word_embeddings"
    ]


@pytest.mark.parametrize("rows", [4, 12, 13])
def test_kv_heads_that_do_not_divide_the_heads(tmp_path: Path, rows):
    tensors = random_tensors()
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight"] = np.ones((rows, 12), np.float32)
    write(tmp_path, tensors, hf_config())
    found = problems(tmp_path)
    assert {"num_key_value_heads", "model.layers.{0..1}.self_attn.k_proj.weight"} & found.keys()


def test_a_wrong_number_does_not_hide_a_missing_tensor(tmp_path: Path):
    tensors = random_tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    write(tmp_path, tensors, hf_config(vocab_size=15))
    assert list(problems(tmp_path)) == ["vocab_size", "model.layers.0.mlp.up_proj.weight"]


def test_a_missing_tensor_alone(tmp_path: Path):
    tensors = random_tensors()
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    write(tmp_path, tensors, hf_config())
    assert list(problems(tmp_path)) == ["model.layers.1.self_attn.v_proj.weight"]


def test_yarn_from_the_yaml_goes_before_config_json(directory: Path, tmp_path: Path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = check(directory, yaml_file(tmp_path / "p.yaml", rope_scaling=scaling))
    assert model.hf_config["rope_scaling"]["beta_fast"] == 32
    assert "rope_scaling" not in model.options
    assert any("rope_scaling" in note for note in model.notes)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("rms_norm_eps", 1e-5, "rms_norm_eps"),
        ("layernorm_epsilon", "1e-5", "rms_norm_eps"),
        ("rotary_base", 10000, "rope_theta"),
        ("rope_theta", 10000, "rope_theta"),
        ("add_qkv_bias", True, "attention_bias"),
        ("hidden_act", "gelu", "hidden_act"),
        ("position_embedding_type", "yarn", "position_embedding_type"),
        ("extend_method", "none", "position_embedding_type"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("softmax_scale", 3.0, "softmax_scale"),
        ("window_size", [4, 0], "window_size"),
        ("rotary_seq_len_interpolation_factor", 4.0, "rotary_seq_len_interpolation_factor"),
        ("use_rope_scaling", True, "use_rope_scaling"),
        ("apply_residual_connection_post_layernorm", True, "apply_residual_connection_post_layernorm"),
        ("normalization", "LayerNorm", "normalization"),
        ("num_experts", 8, "num_experts"),
        ("quantization_config", {"quant_method": "x"}, "quantization"),
    ],
)
@pytest.mark.parametrize("run_mode", ["predict", "finetune"])
def test_a_yaml_that_computes_something_else(directory: Path, tmp_path: Path, run_mode, key, value, named):
    assert list(problems(directory, yaml_file(tmp_path / "p.yaml", run_mode, **{key: value}))) == [named]
    assert list(problems(directory, overrides={key: value})) == [named]


def test_a_yaml_that_declares_the_same_in_other_words(directory: Path, tmp_path: Path):
    same = {"layernorm_epsilon": "1e-6", "theta": 1000000.0, "qkv_has_bias": False, "n_layer": "2", "kv_channels": 4}
    same |= {"hidden_act": "swiglu", "position_embedding_type": "rope", "num_experts": 0, "normalization": "RMSNorm"}
    assert check(directory, yaml_file(tmp_path / "p.yaml", **same)).options == {}


def test_aliases_that_disagree_with_each_other(directory: Path, tmp_path: Path):
    found = problems(directory, yaml_file(tmp_path / "p.yaml", num_layers=7, num_hidden_layers=2))
    assert list(found) == ["num_hidden_layers"]
    assert "set num_layers to 2" in found["num_hidden_layers"].remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [("params_dtype", "int8"), ("compute_dtype", 3), ("block_size", 0), ("seq_length", "abc"), ("num_blocks", True)],
)
def test_options_of_the_run_are_checked_too(directory: Path, tmp_path: Path, key, value):
    assert list(problems(directory, yaml_file(tmp_path / "p.yaml", **{key: value}))) == [key]


def test_null_is_mindformers_default(directory: Path, tmp_path: Path):
    assert check(directory, yaml_file(tmp_path / "p.yaml", compute_dtype=None, seq_length=None)).options == {}


def test_two_names_of_one_option_that_disagree(directory: Path, tmp_path: Path):
    both = {"params_dtype": "float32", "param_init_type": "bfloat16"}
    (problem,) = problems(directory, yaml_file(tmp_path / "p.yaml", **both)).values()
    assert {"float32", "bfloat16"} <= {word.strip(",") for word in problem.found.split()}


def test_null_takes_yarn_away(tmp_path: Path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    directory = write(tmp_path / "hf", random_tensors(), hf_config(rope_scaling=yarn))
    model = check(directory, yaml_file(tmp_path / "p.yaml", rope_scaling=None))
    assert model.hf_config["rope_scaling"] is None
    assert any("rope_scaling" in note for note in model.notes)
    assert check(directory, overrides={"rope_scaling": None}).hf_config["rope_scaling"] is None


def test_an_alias_of_an_option(directory: Path, tmp_path: Path):
    assert check(directory, yaml_file(tmp_path / "p.yaml", param_init_type="float16")).options == {
        "params_dtype": "float16"
    }


def test_what_else_a_yaml_declares_is_not_used_and_noted(directory: Path, tmp_path: Path):
    model = check(directory, yaml_file(tmp_path / "p.yaml", hiden_size=3, max_position_embeddings=64))
    assert model.options == {}
    assert any("hiden_size, max_position_embeddings" in note for note in model.notes)
    assert list(problems(directory, overrides={"hiden_size": 3})) == ["hiden_size"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 8),
        ("num_experts", 3),
        ("moe_intermediate_size", 12),
        ("moe_intermediate_size", 3),
        ("num_attention_heads", 8),
    ],
)
@pytest.mark.parametrize("dialect", [HF, Dialect(None, stacked_experts=True), INFER, TRAIN], ids=str)
def test_each_wrong_number_of_an_moe_is_named_alone(tmp_path: Path, field, value, dialect):
    metadata = {} if dialect.is_hf else {LAYOUT_KEY: str(dialect.layout)}
    tensors = random_tensors(MOE_SPEC, dialect=dialect)
    write(tmp_path / "right", tensors, hf_config(MOE_SPEC), metadata=metadata)
    of_experts = dialect if dialect.is_hf else replace(dialect, layout=dialect.layout.of_experts)
    assert check(tmp_path / "right").dialect == of_experts
    write(tmp_path / "wrong", tensors, hf_config(MOE_SPEC, **{field: value}), metadata=metadata)
    assert list(problems(tmp_path / "wrong")) == [field]


def test_weights_of_the_other_kind(tmp_path: Path):
    write(tmp_path / "a", random_tensors(MOE_SPEC), hf_config())
    found = problems(tmp_path / "a")
    assert list(found) == ["model_type"]
    assert found["model_type"].found == "config.json: qwen3\nweights: experts (Qwen3-MoE)"
    write(tmp_path / "b", random_tensors(), hf_config(MOE_SPEC))
    assert problems(tmp_path / "b")["model_type"].found == "config.json: qwen3_moe\nweights: no experts (dense Qwen3)"


def test_what_a_training_yaml_declares_is_not_to_be_changed(tmp_path: Path):
    directory = write(tmp_path / "hf", random_tensors(MOE_SPEC), hf_config(MOE_SPEC))
    config = yaml_file(tmp_path / "t.yaml", "finetune", norm_topk_prob=False)
    assert "config.json is not theirs" in problems(directory, config)["norm_topk_prob"].remedy
    config = yaml_file(tmp_path / "p.yaml", "predict", norm_topk_prob=False)
    assert "set norm_topk_prob to True" in problems(directory, config)["norm_topk_prob"].remedy


def test_a_missing_expert_is_folded_into_one_row(tmp_path: Path):
    tensors = random_tensors(MOE_SPEC)
    for layer in range(2):
        del tensors[f"model.layers.{layer}.mlp.experts.2.up_proj.weight"]
    found = problems(write(tmp_path, tensors, hf_config(MOE_SPEC)))
    assert list(found) == ["model.layers.{0..1}.mlp.experts.2.up_proj.weight"]


class TestParallel:
    def yaml_file(self, path: Path, run_mode="predict", use_parallel=True, **sizes) -> Path:
        document = {"run_mode": run_mode, "use_parallel": use_parallel, "parallel_config": sizes}
        path.write_text(yaml.safe_dump(document | {"model": {"model_config": {}}}))
        return path

    @pytest.fixture
    def moe(self, tmp_path: Path) -> Path:
        return write(tmp_path / "moe", random_tensors(MOE_SPEC), hf_config(MOE_SPEC))

    def test_sizes_come_from_arguments_or_the_yaml_or_the_number_of_processes(self, moe: Path, tmp_path: Path):
        config = self.yaml_file(tmp_path / "p.yaml", model_parallel=2, expert_parallel=2, data_parallel=1)
        assert check(moe).parallel == ParallelConfig(1, 1)
        assert check(moe, config).parallel == ParallelConfig(2, 2)
        assert check(moe, config, tensor_parallel=2, num_processes=2).parallel == ParallelConfig(2, 2)
        assert check(moe, num_processes=2).parallel == ParallelConfig(2, 1)
        assert check(moe, tensor_parallel=4, expert_parallel=2).parallel == ParallelConfig(4, 2)
        text = "\n".join(summary(check(moe, tensor_parallel=4, expert_parallel=2)))
        assert "4 processes (tensor parallel 4, expert parallel 2)" in text

    def test_those_of_a_training_run_or_of_one_card_are_not_inferences(self, moe: Path, tmp_path: Path):
        sizes = {"model_parallel": 8, "pipeline_stage": 4, "data_parallel": 2}
        assert check(moe, self.yaml_file(tmp_path / "t.yaml", "finetune", **sizes)).parallel == ParallelConfig(1, 1)
        assert check(moe, self.yaml_file(tmp_path / "p.yaml", use_parallel=False, **sizes)).parallel == ParallelConfig()

    def test_contradictions_and_what_cannot_be_done(self, moe: Path, tmp_path: Path):
        config = self.yaml_file(
            tmp_path / "p.yaml", model_parallel=2, expert_parallel="2", pipeline_stage=2, data_parallel=2
        )
        assert list(problems(moe, config, tensor_parallel=4)) == [
            "parallel_config.expert_parallel",
            "parallel_config.data_parallel",
            "parallel_config.pipeline_stage",
            "tensor parallel",
        ]
        assert list(problems(moe, tensor_parallel=2, num_processes=4)) == ["tensor parallel"]
        assert list(problems(moe, tensor_parallel=8)) == ["num_attention_heads", "moe_ffn_hidden_size"]

    def test_all_at_once_with_what_does_not_fit(self, moe: Path):
        write(moe, {}, hf_config(MOE_SPEC, moe_intermediate_size=7))
        write(moe, random_tensors(MOE_SPEC))
        assert list(problems(moe, expert_parallel=3)) == ["moe_intermediate_size", "expert parallel"]


def test_other_checkpoints_that_the_yaml_names_are_noted(directory: Path, tmp_path: Path):
    config = tmp_path / "p.yaml"
    document = {
        "pretrained_model_dir": "/other/hf",
        "load_checkpoint": "/other/ckpt",
        "model": {"model_config": {"a": 1}},
    }
    config.write_text(yaml.safe_dump(document))
    notes = "\n".join(check(directory, config).notes)
    assert "/other/hf" in notes
    assert "/other/ckpt" in notes


def test_max_length(directory: Path, tmp_path: Path):
    assert check(directory).max_length == 128
    assert check(directory, overrides={"seq_length": 64}).max_length == 64
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert check(directory, yaml_file(tmp_path / "p.yaml", rope_scaling=scaling)).max_length == 512
    assert check(directory, overrides={"block_size": 4, "num_blocks": 5}).max_length == 20


class TestMindFormersWeights:
    """Nothing in a tensor shows how QKV and gate/up are laid out."""

    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        return write(tmp_path / "unified_safe", random_tensors(dialect=TRAIN))

    def test_without_a_word_about_the_layout_they_are_refused(self, directory: Path, weights: Path):
        with pytest.raises(BridgeError, match="nothing declares the layout of QKV and gate/up"):
            check(directory, weights=weights)

    @pytest.mark.parametrize("qkv", [True, False])
    @pytest.mark.parametrize("gate_up", [True, False])
    def test_the_yaml_declares_it(self, directory: Path, weights: Path, tmp_path: Path, qkv, gate_up):
        layout = Layout(qkv, gate_up)
        model = check(directory, yaml_file(tmp_path / "train.yaml", "finetune", **layout.training_flags), weights)
        assert model.dialect == Dialect(layout)

    @pytest.mark.parametrize("layout", [Layout(True, False), Layout(False, True), Layout(False, False)], ids=str)
    def test_contiguous_flags_of_a_predict_yaml_do_not_declare_enough(
        self, directory: Path, weights: Path, tmp_path: Path, layout: Layout
    ):
        """The number of blocks depends on the training run's ``model_parallel``."""
        config = yaml_file(tmp_path / "predict.yaml", **layout.training_flags)
        with pytest.raises(BridgeError, match="nothing declares the layout of QKV and gate/up"):
            check(directory, config, weights)

    def test_a_yaml_without_the_flags_means_the_defaults(self, directory: Path, weights: Path, tmp_path: Path):
        assert check(directory, yaml_file(tmp_path / "train.yaml", "finetune", offset=0), weights).dialect == TRAIN

    def test_a_predict_yaml_without_the_flags_declares_nothing(self, directory: Path, weights: Path, tmp_path: Path):
        with pytest.raises(BridgeError, match="nothing declares the layout of QKV and gate/up"):
            check(directory, yaml_file(tmp_path / "predict.yaml", params_dtype="float32"), weights)

    def test_one_flag_does_not_speak_for_the_other(self, directory: Path, weights: Path, tmp_path: Path):
        config = yaml_file(tmp_path / "predict.yaml", use_contiguous_weight_layout_attention=False)
        with pytest.raises(BridgeError, match="nothing declares the layout of QKV and gate/up"):
            check(directory, config, weights)

    @pytest.mark.parametrize("value", ["False", 0])
    def test_flags_are_true_or_false(self, directory: Path, weights: Path, tmp_path: Path, value):
        with pytest.raises(BridgeError, match="true or false"):
            check(directory, yaml_file(tmp_path / "t.yaml", "train", use_interleaved_weight_layout_mlp=value), weights)

    def test_null_flags_declare_nothing(self, directory: Path, weights: Path, tmp_path: Path):
        config = yaml_file(tmp_path / "p.yaml", **dict.fromkeys(TRAIN.layout.training_flags))
        with pytest.raises(BridgeError, match="nothing declares"):
            check(directory, config, weights)

    @pytest.mark.parametrize("run_mode", ["train", "finetune", "eval", "predict_with_train_model"])
    def test_modes_that_run_the_training_network(self, directory: Path, weights: Path, tmp_path: Path, run_mode):
        assert check(directory, yaml_file(tmp_path / "t.yaml", run_mode), weights).dialect == TRAIN

    def test_layout_metadata_of_another_program(self, directory: Path, tmp_path: Path):
        with_metadata = write(tmp_path / "s", random_tensors(dialect=INFER), metadata={LAYOUT_KEY: "qkv=zigzag"})
        with pytest.raises(BridgeError, match="zigzag"):
            check(directory, weights=with_metadata)

    def test_config_json_may_be_where_the_yaml_names_it(self, directory: Path, weights: Path, tmp_path: Path):
        config = tmp_path / "train.yaml"
        document = {"run_mode": "train", "pretrained_model_dir": str(directory), "model": {"model_config": {}}}
        config.write_text(yaml.safe_dump(document))
        model = check(weights, config)
        assert (model.hf_dir, model.source.path, model.dialect) == (directory, weights, TRAIN)

    def test_layout_metadata_declares_it(self, directory: Path, tmp_path: Path):
        with_metadata = write(tmp_path / "s", random_tensors(dialect=INFER), metadata={LAYOUT_KEY: str(INFER.layout)})
        assert check(directory, weights=with_metadata).dialect.layout == INFER.layout
        config = yaml_file(tmp_path / "p.yaml", params_dtype="float32")
        assert check(directory, config, with_metadata).dialect.layout == INFER.layout

    def test_layout_metadata_and_yaml_may_not_contradict_each_other(self, directory: Path, tmp_path: Path):
        with_metadata = write(tmp_path / "s", random_tensors(dialect=INFER), metadata={LAYOUT_KEY: str(INFER.layout)})
        config = yaml_file(tmp_path / "p.yaml", **TRAIN.layout.training_flags)
        with pytest.raises(BridgeError, match="contradict"):
            check(directory, config, with_metadata)

    @pytest.mark.parametrize("other", [{LAYOUT_KEY: str(TRAIN.layout)}, {}])
    def test_layout_metadata_that_not_all_files_have_is_worth_nothing(self, directory: Path, tmp_path: Path, other):
        tensors = random_tensors(dialect=INFER)
        half = {name: tensors.pop(name) for name in list(tensors)[::2]}
        weights = write(tmp_path / "s", tensors, metadata={LAYOUT_KEY: str(INFER.layout)})
        write(tmp_path / "t", half, metadata=other)
        (tmp_path / "t" / "model.safetensors").rename(weights / "other.safetensors")
        with pytest.raises(BridgeError, match="declare different layouts"):
            check(directory, weights=weights)


def test_tensors_of_nobody(directory: Path, tmp_path: Path):
    weights = write(tmp_path / "x", {"transformer.h.0.attn": np.zeros(3, np.float32)})
    with pytest.raises(BridgeError, match="neither Hugging Face's nor MindFormers'"):
        check(directory, weights=weights)


def test_tied(tmp_path: Path):
    spec = replace(SPEC, tie_word_embeddings=True)
    model = check(write(tmp_path, random_tensors(spec), hf_config(spec)))
    assert "24 tensors become 18 MindFormers parameters" in "\n".join(summary(model))
