"""Moves weights from a training network to an inference network of the same process, and back.

Called with a JSON file of jobs as ``training_worker.py`` takes them; fails by an assertion.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np

import mf_qwen3_bridge
from tests.integration.training_worker import network_of, start_training
from tests.support.networks import bits


def main(jobs: Path) -> None:
    start_training()
    mf_qwen3_bridge.patch()
    for job in json.loads(jobs.read_text()):
        network = network_of(job)
        before = {name: bits(network)[name] for name, p in network.parameters_dict().items() if p.requires_grad}
        whole = dict(mf_qwen3_bridge.weights(network))
        on_disk = mf_qwen3_bridge.load_checkpoint(job["hf_dir"])
        if not any(name.endswith("experts.gate_up_proj") for name in on_disk):
            assert whole.keys() == on_disk.keys()
            assert all(np.array_equal(whole[name], on_disk[name].asnumpy()) for name in whole)
        expected = bits(mf_qwen3_bridge.from_pretrained(job["hf_dir"], device_target="CPU"))
        inference = mf_qwen3_bridge.from_pretrained(job["hf_dir"], device_target="CPU")
        for parameter in inference.get_parameters():
            parameter.set_data(ms.ops.zeros_like(parameter))
        mf_qwen3_bridge.load(inference, mf_qwen3_bridge.weights(network))
        assert bits(inference) == expected
        for name, parameter in network.parameters_dict().items():
            if name in before:
                parameter.set_data(ms.ops.zeros_like(parameter))
        mf_qwen3_bridge.load(network, mf_qwen3_bridge.weights(inference))
        assert {name: bits(network)[name] for name in before} == before
    print("moved")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
