"""Does what a process of vLLM-MindSpore does to load a Qwen3 with MindFormers, and prints the error of its logits.

``python vllm_worker.py DIRECTORY``. vLLM and vLLM-MindSpore are not needed: these are the calls and the config of
``gen_mf_config`` and ``MindFormersForCausalLM`` (``vllm_mindspore/model_executor/models/mf_models``, 0.5 and 0.6), in
float32, in which the reference is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["RUN_MODE"] = "predict"  # vLLM-MindSpore sets it when it is imported


def mindformers_config(directory: Path) -> Any:
    from mindformers.tools.register import MindFormerConfig

    dtypes = ("compute_dtype", "layernorm_compute_dtype", "rotary_dtype", "params_dtype", "router_dense_type")
    of_vllm = {"max_position_embeddings": 256, "block_size": 16, "pre_process": True, "post_process": True, "offset": 0}
    return MindFormerConfig(
        run_mode="predict",
        use_legacy=False,
        load_ckpt_format="safetensors",
        auto_trans_ckpt=True,
        load_checkpoint=str(directory),
        pretrained_model_dir=str(directory),
        parallel=MindFormerConfig(parallel_mode="STAND_ALONE"),
        parallel_config=MindFormerConfig(model_parallel=1, pipeline_stage=1, data_parallel=1, vocab_emb_dp=False),
        model=MindFormerConfig(model_config=MindFormerConfig(**dict.fromkeys(dtypes, "float32"), **of_vllm)),
    )


def main(directory: Path) -> None:
    from mf_qwen3_bridge.mindformers.vllm_plugin import register

    register()
    import mindspore as ms
    import numpy as np
    from mindformers import AutoModel
    from mindformers.core.context import build_mf_context
    from mindspore.nn.utils import no_init_parameters

    from mf_qwen3_bridge.mindformers.network import network_logits
    from tests.support.golden import golden

    ms.set_device("CPU")
    config = mindformers_config(directory)
    build_mf_context(config)
    with no_init_parameters():
        network = AutoModel.from_config(config)
        network.model.return_hidden_states = True
    network.load_weights(config.load_checkpoint)
    for case in golden(directory.name):
        logits = network_logits(network, case.prompt)
        print(f"error {np.abs(logits - case.logits).max() / np.abs(case.logits).max():.3e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
