"""Computes logits with MindFormers' training network on a CPU, in a process of its own.

MindFormers keeps one context per process, and the other tests use the one for inference. Called with a JSON file: a
list of jobs, each with

    hf_dir     the Hugging Face directory
    config     what a YAML says in ``model.model_config``
    converted  MindFormers weights to load as they are stored; null: the network is filled from ``hf_dir``
    lora       a file of trained LoRA matrices, for a network with a ``pet_config``; left out: none
    tokens     token IDs, a list of equally long lists
    output     file to write the logits to: float32 (lists, tokens, vocab_size), ``.npy``
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindformers import build_context, set_context
from mindformers.models.build_config import get_model_config
from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM
from mindformers.models.qwen3_moe.modeling_qwen3_moe_train import TrainingQwen3MoeForCausalLM
from mindformers.pet import get_pet_model
from mindformers.tools.register import MindFormerConfig
from mindformers.utils import load_checkpoint_utils

import mf_qwen3_bridge
from mf_qwen3_bridge.mindformers.cpu import inference_ops
from mf_qwen3_bridge.model.lora import adapted_parameter
from mf_qwen3_bridge.model.parameters import is_counter

CLASSES = {"qwen3": TrainingQwen3ForCausalLM, "qwen3_moe": TrainingQwen3MoeForCausalLM}


def network_of(job: dict[str, Any]) -> Any:
    """The network, with all of the weights."""
    section = {"pretrained_model_dir": job["hf_dir"], "model_config": MindFormerConfig(**job["config"])}
    config = get_model_config(MindFormerConfig(**section))
    network = CLASSES[config.model_type](config)
    preprocess = network.model.preprocess_labels_and_masks
    if pet_config := section["model_config"].get("pet_config"):
        network = get_pet_model(network, pet_config)
    network.set_train(False)
    # No token is padding, which upstream hides from all others: 1.7.0 takes 0 for it, whatever the config says.
    preprocess.casual_mask.pad_token_id = -1
    if job["converted"] is None:
        settings = MindFormerConfig(use_parallel=False, auto_trans_ckpt=False)
        load_checkpoint_utils.load_safetensors_checkpoint(settings, [], network, "", job["hf_dir"], None)
        if pet_config:
            trained = ms.load_checkpoint(job["lora"], format="safetensors")
            assert trained.keys() == set(filter(adapted_parameter, network.parameters_dict()))
            assert ms.load_param_into_net(network, trained)[1] == []
        return network
    parameters: dict[str, ms.Parameter] = {}
    for file in sorted(Path(job["converted"]).glob("*.safetensors")):
        parameters |= ms.load_checkpoint(str(file), format="safetensors")
    unloaded, unused = ms.load_param_into_net(network, parameters)
    # What else the network has are counters, and dropout's random state.
    assert [name for name in unloaded if not is_counter(name)] == [] == unused, (unloaded, unused)
    return network


def start_training() -> None:
    """A process that does nothing else."""
    os.environ["RUN_MODE"] = "finetune"
    ms.set_context(device_target="CPU")
    build_context(
        {
            "use_legacy": False,
            "run_mode": "finetune",
            "context": {"mode": ms.GRAPH_MODE, "device_target": "CPU"},
            "parallel": {},
            "parallel_config": {},
        }
    )


def start_with_inference(directory: str) -> Callable[[], list[int]]:
    """A process that has generated before; returns a function that generates again."""
    network = mf_qwen3_bridge.from_pretrained(directory, device_target="CPU")

    def generate() -> list[int]:
        ms.set_context(mode=ms.PYNATIVE_MODE)
        (output,) = network.generate(input_ids=[[1, 2, 3]], max_new_tokens=8, do_sample=False, eos_token_id=[-1])
        ms.set_context(mode=ms.GRAPH_MODE)
        set_context(run_mode="finetune")
        return list(map(int, output))

    return generate


def main(jobs: Path, *flags: str) -> None:
    jobs_to_do = json.loads(jobs.read_text())
    generate = None
    if "--after_inference" in flags:
        generate = start_with_inference(jobs_to_do[0]["hf_dir"])
        before = generate()
    else:
        start_training()
    mf_qwen3_bridge.patch()
    for job in jobs_to_do:
        tokens = ms.Tensor(np.array(job["tokens"], np.int32))
        network = network_of(job)
        logits = network(tokens, labels=tokens).asnumpy()  # MindFormers 1.7.0 wants labels, whatever they are
        np.save(job["output"], logits.reshape(*tokens.shape, -1))
    if generate is not None:
        assert not inference_ops.STAND_INS.installed, "a training network got the stand-ins for inference"
        assert generate() == before


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
