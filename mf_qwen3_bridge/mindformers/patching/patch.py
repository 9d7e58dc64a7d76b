"""What the bridge changes of MindFormers' classes, and takes back again.

============================================ ========================================================================
replaced                                     by
============================================ ========================================================================
``Inference*.convert_weight_dict``           conversion by the training class, in the layout of whoever reads it
``Inference*.convert_map_dict``              likewise, of the index
``Inference*.obtain_name_map``               a refusal: names can't say that three tensors make one parameter
``Inference*.load_weights``                  the bridge's loader: everything is loaded, or an error says what is not
``AutoModel.from_pretrained``                the bridge's ``from_pretrained``, with ``auto_convert=True``
``AutoConfig.from_pretrained``               reads a Hugging Face directory's config.json
``Qwen3Config.__init__``, ``Qwen3MoeConfig`` upstream's, given a config.json in the form that it understands
``Inference*.generate``                      upstream's, but not from weights that were never loaded
``process_hf_checkpoint``                    Qwen3's files stay as they are: the loaders read them
``is_hf_safetensors_dir``                    what it says of them, without opening files that may be damaged
``BaseTrainer.count_parameters``             upstream's, but nothing is fine-tuned from random weights
``load_safetensors_checkpoint``              the bridge's loader, for Hugging Face's files and those with its stamp
``load_checkpoint``, ``load_hf_checkpoint``  likewise, in MindFormers' newer checkpoint format
============================================ ========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM
from mindformers.trainer.base_trainer import BaseTrainer
from mindformers.utils import load_checkpoint_utils

from mf_qwen3_bridge.mindformers import conversion
from mf_qwen3_bridge.mindformers.patching import auto, compat, configs, hooks
from mf_qwen3_bridge.mindformers.patching.replacements import Owner, Replacements


class ClassOrInstanceMethod:
    """A method whose first argument is the instance, or the class when it is called on the class.

    Upstream calls the same hook both ways, depending on where it comes from.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return partial(self.function, owner if instance is None else instance)


def _entries() -> Iterator[tuple[Owner, str, Any]]:
    for network in hooks.INFERENCE_NETWORKS:
        for hook in (conversion.convert_weight_dict, conversion.convert_map_dict, conversion.obtain_name_map):
            yield network, hook.__name__, ClassOrInstanceMethod(hook)
        yield network, "load_weights", hooks.load_weights
        yield network, "generate", hooks.generating(network.generate)
    loading = hooks.loading_safetensors(load_checkpoint_utils.load_safetensors_checkpoint)
    yield load_checkpoint_utils, "load_safetensors_checkpoint", loading
    passing_on = hooks.passing_on_hf(load_checkpoint_utils.process_hf_checkpoint)
    yield load_checkpoint_utils, "process_hf_checkpoint", passing_on
    recognising = hooks.recognising_hf(load_checkpoint_utils.is_hf_safetensors_dir)
    yield load_checkpoint_utils, "is_hf_safetensors_dir", recognising
    yield BaseTrainer, "count_parameters", hooks.counting_parameters(BaseTrainer.count_parameters)
    for module, name in compat.loaders_of_new_format():
        yield module, name, hooks.loading_hf(vars(module)[name])
    for model in (AutoModel, AutoModelForCausalLM):
        yield model, "from_pretrained", classmethod(auto.converting_model(model.from_pretrained.__func__))
    reading = auto.reading_config(AutoConfig.from_pretrained.__func__)
    yield AutoConfig, "from_pretrained", classmethod(reading)
    for config in auto.CONFIGS.values():
        yield config, "__init__", configs.understanding(vars(config)["__init__"])


_PATCH = Replacements(_entries())


def patch() -> None:
    """Puts the bridge in MindFormers' way for Qwen3 and Qwen3-MoE. Calling it again changes nothing."""
    _PATCH.install()


def is_patched() -> bool:
    """Whether the bridge is in MindFormers' way in this process."""
    return bool(_PATCH.upstream)


def unpatch() -> None:
    """Takes it out again: MindFormers is as it was, but for stand-ins that a CPU needs."""
    _PATCH.uninstall()
