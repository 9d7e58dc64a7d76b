"""What the commands that write once did without a word, or with a traceback."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import yaml
from mf_qwen3_bridge.cli.files import convert_weight
from mf_qwen3_bridge.cli.main import main
from mf_qwen3_bridge.convert.jobs import to_hf, to_mindformers, to_ranks, unify
from mf_qwen3_bridge.convert.run import run
from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.inspection import inspect
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import check, check_trained
from mf_qwen3_bridge.inputs.rank_files import Sharding, open_rank_files
from mf_qwen3_bridge.model.layouts import Layout
from mf_qwen3_bridge.model.parallel import ParallelConfig
from mf_qwen3_bridge.model.rules import HF, INFER, TRAIN, Dialect
from tests.support.checkpoints import MOE_SPEC, SPEC, contents, hf_config, random_tensors, write
from tests.support.damage import unwrapped

EVEN = replace(SPEC, ffn_hidden_size=12)
FULL = {"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write(tmp_path / "hf", random_tensors(EVEN), hf_config(EVEN))


def training_yaml(tmp_path: Path, model_parallel: int = 1, **model_config: object) -> Path:
    document = {
        "run_mode": "finetune",
        "use_parallel": model_parallel > 1,
        "parallel_config": {"model_parallel": model_parallel},
        "model": {"model_config": model_config},
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("size", [3, 4])
def test_blocks_that_do_not_divide_the_model(tmp_path, capsys, hf, size):
    """With more ranks than KV heads the rule of inference once dropped rows, and nobody noticed."""
    config = training_yaml(tmp_path, size, use_contiguous_weight_layout_attention=True)
    text = refusal(capsys, "convert", "--model_dir", hf, "--config", config, "--output_dir", tmp_path / "out")
    assert "num_query_groups" in text
    assert not (tmp_path / "out").exists()


def test_a_directory_per_rank_is_of_the_yamls_size(tmp_path, capsys):
    hf = write(tmp_path / "moe", random_tensors(MOE_SPEC), hf_config(MOE_SPEC))
    config = training_yaml(tmp_path, 2, use_contiguous_weight_layout_attention=True)
    with pytest.raises(SystemExit) as done:
        arguments = ["--model_dir", hf, "--config", config, "--ep", 2, "--output_dir", tmp_path / "out"]
        main(["convert", *map(str, arguments)])
    assert done.value.code == 0
    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert contents(tmp_path / "out" / "rank_0")[qkv].shape == (16, 12)  # of 32 rows


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_number_that_is_none(tmp_path, capsys, hf, key):
    run(to_mindformers(check(hf), TRAIN, tmp_path / "mf"))
    config = training_yaml(tmp_path, **(FULL | {key: "tiny"}))
    out = ["--output_path", tmp_path / "out"]
    text = refusal(capsys, "export", "--input_path", tmp_path / "mf", "--config", config, *out)
    assert key in text and "'tiny'" in text


@pytest.mark.parametrize("out", ["x.incomplete", "/", "hf/config.json/x", "."])
def test_names_that_no_output_can_have(tmp_path, capsys, monkeypatch, hf, out):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if out == "." else tmp_path)
    before = sorted(tmp_path.rglob("*"))
    refusal(capsys, "convert", "--model_dir", hf, "--output_dir", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_suffix_for_what_is_merged(tmp_path, capsys, hf):
    run(to_mindformers(check(hf), TRAIN, tmp_path / "mf"))
    arguments = ["--input_path", tmp_path / "mf", "--file_suffix", "1_1", "--output_path", tmp_path / "out"]
    assert "--file_suffix" in refusal(capsys, "export", *arguments)


def test_numbers_and_yaml_of_the_other_kind(tmp_path, capsys, hf):
    run(to_mindformers(check(hf), TRAIN, tmp_path / "mf"))
    config = training_yaml(tmp_path, model_type="qwen3_moe")
    arguments = ["--input_path", tmp_path / "mf", "--output_path", tmp_path / "out"]
    text = refusal(capsys, "export", *arguments, "--config", config, "--moe_ffn_hidden_size", 768)
    assert "model_type" in text and "moe_ffn_hidden_size" in text


def test_blocks_are_not_cut_again(tmp_path, capsys, hf):
    run(to_mindformers(check(hf), Dialect(Layout(False, False).on(2)), tmp_path / "mf"))
    arguments = ["--model_dir", hf, "--load_checkpoint", tmp_path / "mf", "--output_dir", tmp_path / "out"]
    assert "mf-qwen3 export" in refusal(capsys, "convert", *arguments, "--layout", "infer", "--tp", 2)


def test_rows_of_a_rank_may_be_empty(tmp_path):
    """The last rows of a vocabulary that was made larger; all of it may not be."""
    tensors = random_tensors(EVEN)
    tensors["model.embed_tokens.weight"][EVEN.vocab_size // 2 :] = 0
    model = check(write(tmp_path / "hf", tensors, hf_config(EVEN)))
    for target in (INFER, TRAIN):
        run(to_ranks(model, target, tmp_path / str(target.stacked_experts), ParallelConfig(2)))
    ranks = [contents(tmp_path / "False" / f"rank_{rank}") for rank in range(2)]
    assert [bool(np.any(rank["embedding.word_embeddings.weight"])) for rank in ranks] == [True, False]


def test_an_axis_that_no_block_describes(tmp_path):
    """No parameter of Qwen3 is cut so; merged as if it were a matrix it would be scrambled."""
    whole = np.arange(32, dtype=np.float32).reshape(2, 4, 4)
    for rank, part in enumerate(np.split(whole, 2, axis=1)):
        write(tmp_path / f"rank_{rank}", {"odd": np.ascontiguousarray(part)})
    with pytest.raises(BridgeError, match="3 axes"):
        open_rank_files(tmp_path, [{"odd": Sharding((2,), (-1, 0, -1))}])


def test_a_scalar_is_merged_too(tmp_path):
    for rank in range(2):
        write(tmp_path / f"rank_{rank}", {"scalar": np.array(3.5, np.float32)})
    run(unify(open_rank_files(tmp_path, [{"scalar": Sharding((2,), ())}]), tmp_path / "out"))
    assert contents(tmp_path / "out")["scalar"] == 3.5


def two_ranks(tmp_path: Path, tensors: dict[str, np.ndarray]) -> list[dict[str, Sharding]]:
    """Everything with a first axis cut in two there, in the files of two ranks."""
    cuts = {}
    for rank in range(2):
        held = {name: np.ascontiguousarray(np.split(tensor, 2)[rank]) for name, tensor in tensors.items()}
        write(tmp_path / f"rank_{rank}", held)
    for name, tensor in tensors.items():
        cuts[name] = Sharding((2,), (0, *[-1] * (tensor.ndim - 1)))
    return [cuts]


def test_a_rank_that_saved_zeros(tmp_path):
    """What another rank saved of the same tensor does not excuse it."""
    tensors = random_tensors(EVEN, TRAIN)
    strategies = two_ranks(tmp_path / "ranks", tensors)
    held = contents(tmp_path / "ranks" / "rank_1")
    write(tmp_path / "ranks" / "rank_1", {name: np.zeros_like(tensor) for name, tensor in held.items()})
    ranks = open_rank_files(tmp_path / "ranks", strategies, weights_only=True)
    job = to_hf(check_trained(ranks), tmp_path / "out")
    with pytest.raises(BridgeError, match="all zero"):
        run(job)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
def test_a_rank_whose_tokens_nobody_uses(tmp_path, name):
    """As the same weights, merged, are exported; all of a tensor may not be zero."""
    tensors = random_tensors(EVEN, TRAIN)
    for rows, is_refused in ((EVEN.vocab_size // 2, False), (0, True)):
        tensors[name][rows:] = 0
        directory = tmp_path / str(rows)
        ranks = open_rank_files(directory / "ranks", two_ranks(directory / "ranks", tensors), weights_only=True)
        job = to_hf(check_trained(ranks), directory / "out")
        if is_refused:
            with pytest.raises(BridgeError, match="all zero"):
                run(job)
        else:
            run(job)
        assert (directory / "out").exists() != is_refused


def test_an_optimizers_state_that_no_strategy_lists(tmp_path):
    """One rank's block of it would be taken for all of it."""
    tensors = random_tensors(EVEN, TRAIN)
    state = {f"adam_m.{name}": tensor for name, tensor in tensors.items()}
    (strategies,) = two_ranks(tmp_path / "ranks", tensors | state)
    listed = [{name: strategies[name] for name in tensors}]
    with pytest.raises(BridgeError, match="in no strategy file"):
        open_rank_files(tmp_path / "ranks", listed)
    for which in ({"weights_only": True}, {"without_prefix": "adam_"}):
        assert open_rank_files(tmp_path / "ranks", listed, **which).tensors.keys() == tensors.keys()


def test_an_optimizers_state_that_is_not_whole_does_not_matter_to_an_export(tmp_path):
    tensors = random_tensors(EVEN, TRAIN)
    state = {f"adam_m.{name}": tensor for name, tensor in tensors.items()}
    strategies = two_ranks(tmp_path / "ranks", tensors | state)
    held = contents(tmp_path / "ranks" / "rank_1")
    write(tmp_path / "ranks" / "rank_1", {name: held[name] for name in tensors})
    with pytest.raises(BridgeError, match="blocks in no rank's file"):
        open_rank_files(tmp_path / "ranks", strategies)
    assert open_rank_files(tmp_path / "ranks", strategies, weights_only=True).tensors.keys() == tensors.keys()


def test_the_flag_for_gate_and_up_declares_nothing_of_experts(tmp_path):
    """So a MoE does not depend on the training run's size when its QKV is interleaved."""
    hf = write(tmp_path / "hf", random_tensors(MOE_SPEC), hf_config(MOE_SPEC))
    with_flag = training_yaml(tmp_path, 2, use_interleaved_weight_layout_mlp=False)
    model = check(hf, with_flag)
    assert model.yaml_layout == Layout(True, True)
    run(to_mindformers(model, Dialect(model.yaml_layout), tmp_path / "mf"))
    for config in (with_flag, training_yaml(tmp_path, 4, use_interleaved_weight_layout_mlp=True), None):
        assert check(hf, config, tmp_path / "mf", num_processes=2).dialect == TRAIN


def test_defaults_are_for_weights_without_a_config(tmp_path, hf):
    run(to_mindformers(check(hf), TRAIN, tmp_path / "mf"))
    (tmp_path / "mf" / "config.json").write_text((hf / "config.json").read_text())
    arguments = ["--model", "qwen3", "--reversed", "--input_path", tmp_path / "mf" / "part0.safetensors"]
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments), "--output_path", str(tmp_path / "out")], command=convert_weight)
    assert done.value.code == 0


def test_a_yaml_whose_sections_are_numbers(tmp_path, hf):
    (tmp_path / "odd.yaml").write_text("run_mode: train\nparallel_config: 4\nparallel: 1\nmodel: {model_config: {}}\n")
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as done:
        main(["convert", "--model_dir", str(hf), "--tp", "2", "--config", str(tmp_path / "odd.yaml"), *out])
    assert done.value.code == 0


def test_sections_that_are_none(tmp_path, capsys, hf):
    """Each ended in a traceback: AttributeError, AttributeError, TypeError."""
    for content in ("parallel_config: [1]", "run_mode: predict\nparallel_config: x", "pretrained_model_dir: [x]"):
        (tmp_path / "odd.yaml").write_text(f"{content}\nmodel: {{model_config: {{}}}}\n")
        with pytest.raises(SystemExit) as done:
            main(["check", "--model_dir", str(hf), "--config", str(tmp_path / "odd.yaml")])
        assert done.value.code == (2 if "pretrained" in content else 0)
    assert "pretrained_model_dir" in capsys.readouterr().err


@pytest.mark.parametrize("value", [None, [8], {"of": 128}, "8"])
def test_experts_of_a_dense_model_mean_nothing(tmp_path, value):
    config = hf_config(EVEN, num_experts_per_tok=value, num_local_experts=None)
    assert check(write(tmp_path / "hf", random_tensors(EVEN), config)).spec == EVEN


@pytest.mark.parametrize("value", ["0", "²", "-1", "9" * 5000])
def test_metadata_of_no_number_of_ranks(tmp_path, capsys, value):
    layout = {"mf_qwen3_bridge.layout": f"qkv=contiguous,gate_up=contiguous,tensor_parallel={value}"}
    directory = write(tmp_path / "mf", random_tensors(EVEN, TRAIN), metadata=layout)
    assert "unknown layout" in refusal(capsys, "inspect", directory)
    ranks = {"mf_qwen3_bridge.tensor_parallel": value}
    with_ranks = write(tmp_path / "ranks", random_tensors(EVEN, TRAIN), metadata=ranks)
    config = training_yaml(tmp_path, use_contiguous_weight_layout_attention=True)
    assert check_trained(open_source(with_ranks), config=config).dialect == Dialect(Layout(False, True))


def test_a_yaml_that_contains_itself_or_a_billion_values(tmp_path, capsys, hf):
    laughs = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}' if n else 'ha'] * 10)}]" for n in range(10))
    for content, found in (("unknown: &a [*a]", "in itself"), (laughs, "more than 100000 values")):
        (tmp_path / "odd.yaml").write_text(f"{content}\nmodel: {{model_config: {{}}}}\n")
        assert found in refusal(capsys, "check", "--model_dir", hf, "--config", tmp_path / "odd.yaml")


@pytest.mark.parametrize("dialect", [HF, TRAIN], ids=str)
def test_groups_that_do_not_divide_the_heads(tmp_path, capsys, dialect):
    """By the tensors alone, without a config.json; ValueError until now."""
    tensors = random_tensors(EVEN, dialect)
    for name, rows in (("k_proj", 12), ("v_proj", 12), ("linear_qkv", 40)):
        tensors |= {n: np.ones((rows, 12), np.float32) for n in tensors if f".{name}." in n}
    directory = write(tmp_path / "odd", tensors)
    for command in (["verify", directory], ["verify", directory, directory]):
        assert "don't show num_query_groups" in refusal(capsys, *command)
    assert any("num_query_groups" in line for line in inspect(directory).unusual)


def test_metadata_of_ranks_that_do_not_divide_the_model(tmp_path, capsys):
    layout = {"mf_qwen3_bridge.layout": "qkv=contiguous,gate_up=contiguous,tensor_parallel=3"}
    directory = write(tmp_path / "mf", random_tensors(EVEN, TRAIN), metadata=layout)
    for command in (["verify", directory], ["verify", directory, directory]):
        assert "tensor parallel of the training run" in unwrapped(refusal(capsys, *command))


@pytest.mark.parametrize("value", [[], {"a": 1}, "x", None])
def test_a_tie_that_is_neither(tmp_path, capsys, hf, value):
    run(to_mindformers(check(hf), TRAIN, tmp_path / "mf"))
    config = training_yaml(tmp_path, tie_word_embeddings=value)
    arguments = ["--input_path", tmp_path / "mf", "--output_path", tmp_path / "out", "--config", config]
    if value is None:
        main_is_done("export", *arguments)
    else:
        assert "tie_word_embeddings" in refusal(capsys, "export", *arguments)


def main_is_done(*arguments: object) -> None:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert done.value.code == 0


@pytest.mark.parametrize("key", ["layout", "tensor_parallel"])
@pytest.mark.parametrize("other", [{}, {"layout": "qkv=interleaved,gate_up=interleaved", "tensor_parallel": "1"}])
def test_files_that_declare_different_layouts(tmp_path, capsys, key, other):
    """They were taken to have MindFormers' default layout, with a note: contiguous ones came out scrambled."""
    value = {"layout": "qkv=contiguous,gate_up=contiguous", "tensor_parallel": "2"}[key]
    directory = write(
        tmp_path / "mf", random_tensors(EVEN, TRAIN), shards=2, metadata={f"mf_qwen3_bridge.{key}": value}
    )
    file = directory / "model-00002-of-00002.safetensors"
    save_file(load_file(file), file, {f"mf_qwen3_bridge.{key}": other[key]} if other else None)
    for command in (["export", "--input_path", directory, "--output_path", tmp_path / "out"], ["inspect", directory]):
        text = refusal(capsys, *command)
        assert "declare different layouts" in text and value in text and (other or {key: "none"})[key] in text
    assert not (tmp_path / "out").exists()


def test_files_of_several_steps_are_no_one_checkpoint(tmp_path: Path):
    """As the trainer leaves them; each of them is a whole one, and none is stale."""
    for step in ("1_100", "1_20"):
        write(tmp_path / step, random_tensors(SPEC, TRAIN))
        (tmp_path / "rank_0").mkdir(exist_ok=True)
        (tmp_path / step / "model.safetensors").rename(tmp_path / "rank_0" / f"qwen3_rank_0-{step}.safetensors")
        (tmp_path / step).rmdir()
    for directory in (tmp_path / "rank_0", tmp_path):
        with pytest.raises(BridgeError) as error:
            inspect(directory)
        (problem,) = error.value.problems
        assert (problem.subject, problem.found) == ("steps", "1_20, 1_100")
        assert problem.remedy == f"give one of them, such as {tmp_path / 'rank_0' / 'qwen3_rank_0-1_100.safetensors'}"
    with pytest.raises(BridgeError, match="its rank_0 does: a run on one card saves the whole model in one file"):
        open_source(tmp_path)


def test_ranks_of_a_parallel_run_are_named_with_what_to_do(tmp_path: Path):
    for rank in (0, 2, 10):  # those of this machine
        write(tmp_path / f"rank_{rank}", random_tensors(SPEC, TRAIN))
    with pytest.raises(BridgeError, match="its rank_0 to rank_10 do: what the ranks of a run saved"):
        open_source(tmp_path)


def test_a_lora_is_named(tmp_path: Path):
    lora = {"model.layers.0.self_attn.q_proj.lora_A.weight": random_tensors()["model.norm.weight"]}
    with pytest.raises(BridgeError, match="it is of a LoRA adapter: merge the adapter"):
        check(write(tmp_path / "both", random_tensors() | lora, hf_config())).plan(HF)
    adapter = write(tmp_path / "adapter", lora)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(BridgeError, match="holds a LoRA adapter, not a model"):
        check(adapter)


def test_the_name_of_what_is_not_finished_yet(tmp_path: Path):
    (tmp_path / "out.incomplete").mkdir()
    for name in ("out", "out.incomplete"):
        with pytest.raises(BridgeError, match=r"out\.incomplete is not finished"):
            open_source(tmp_path / name)
