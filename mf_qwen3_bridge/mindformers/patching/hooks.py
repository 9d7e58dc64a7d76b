"""Replaces MindFormers' entry points for loading weights and for generating."""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.checkpoint import checkpoint
from mindformers.models.qwen3 import modeling_qwen3
from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM
from mindformers.models.qwen3_moe.modeling_qwen3_moe_train import TrainingQwen3MoeForCausalLM
from mindformers.tools.logger import logger
from mindformers.trainer import base_trainer
from mindformers.utils import load_checkpoint_utils

from mf_qwen3_bridge.errors import BridgeError
from mf_qwen3_bridge.inputs.mindformers_config import ADAPTER_KEY, LAYOUT_FLAGS
from mf_qwen3_bridge.inputs.opening import open_source
from mf_qwen3_bridge.inputs.preflight import CheckedCheckpoint, check_against_config
from mf_qwen3_bridge.inputs.source import HF_INDEX, HYPER_PARAMETERS, LAYOUT_KEY
from mf_qwen3_bridge.mindformers import conversion
from mf_qwen3_bridge.mindformers.cpu.device import inference_device
from mf_qwen3_bridge.mindformers.in_memory import load
from mf_qwen3_bridge.mindformers.load import FILLED, load_network
from mf_qwen3_bridge.mindformers.load_training import load_pynative_network, load_training_network
from mf_qwen3_bridge.mindformers.network import INFERENCE_NETWORKS, check_token_ids
from mf_qwen3_bridge.mindformers.patching.configs import declared_layout_flags, named_adapters
from mf_qwen3_bridge.mindformers.replacements import HOOKS
from mf_qwen3_bridge.model.parameters import is_hf_name
from mf_qwen3_bridge.transfer.safetensors import TensorInfo, read_header

# MindFormers 2.x's main line of training (1.9 has it too); None where HyperParallel, which it needs, is not installed.
PYNATIVE_NETWORK = getattr(modeling_qwen3, "PyNativeQwen3ForCausalLM", None)
NETWORKS = (*INFERENCE_NETWORKS, TrainingQwen3ForCausalLM, TrainingQwen3MoeForCausalLM)
NETWORKS += (PYNATIVE_NETWORK,) if PYNATIVE_NETWORK else ()
# Who calls load_hf_checkpoint (1.9 and later). The PyNative trainer takes it from ``checkpoint`` when it is imported,
# which may have happened, and is too heavy to be done here for everybody.
_PYNATIVE_TRAINER = sys.modules.get("mindformers.pynative.trainer.trainer")
_CALLERS: tuple[Any, ...] = (base_trainer, checkpoint, *([_PYNATIVE_TRAINER] if _PYNATIVE_TRAINER else []))


class ClassOrInstanceMethod:
    """A method whose first argument is the instance, or the class: upstream calls the same hook on both."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return partial(self.function, owner if instance is None else instance)


# The inference classes have these from ``ModelMixin``, where they raise that they are not implemented.
for _function in (conversion.convert_weight_dict, conversion.convert_map_dict, conversion.obtain_name_map):
    HOOKS.replaces(INFERENCE_NETWORKS, _function.__name__, inherited=True)(ClassOrInstanceMethod(_function))


@HOOKS.wraps_upstream(INFERENCE_NETWORKS, "load_weights", inherited=True)
def wrap_load_weights(
    upstream: Callable[..., None],
    network: Any,
    weights_path: str | Path | None = None,
    weights: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None,
) -> None:
    """Fills an inference network; everything is loaded, or an error lists what is wrong.

    Stands for ``load_weights`` of ``mindformers/parallel_core/inference/model_utils.py`` (1.7 to 2.1), which never
    compares what it found with what it needed. A network that MindFormers quantises is left to it.

    Args:
        weights_path: a directory or file of Hugging Face's weights, or of MindFormers' if metadata or YAML declare
            their layout.
        weights: (name, array) of each tensor, where there is no such path: see :func:`load`.

    Raises:
        BridgeError: the weights are not whole, do not fit the network, or neither argument names any.
    """
    if _is_quantised(network):
        logger.warning("mf-qwen3-bridge leaves quantised weights to MindFormers, which does not check what it skips")
        upstream(network, weights_path, weights)
        FILLED.add(network)
    elif weights_path and Path(weights_path).exists():
        load_network(network, check_against_network(network, Path(weights_path)))
    elif weights is not None:
        _refuse_adapters(network, "weights in memory")
        load(network, weights)
    else:
        raise BridgeError(f"weights_path {str(weights_path)!r} does not exist, and no weights are given")


@HOOKS.wraps_upstream(INFERENCE_NETWORKS, "generate", inherited=True)
def wrap_generate(upstream: Callable[..., Any], network: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate``, but not from weights that were never loaded, nor of tokens that the model does not know.

    Stands for that of ``mindformers/generation/text_generator.py`` (1.7 to 2.1), which generates from zeros when
    MindFormers found no weights, or was not asked for any.
    """
    if network not in FILLED:
        name, some = next((n, p) for n, p in network.parameters_dict().items() if n.endswith("linear_qkv.weight"))
        if not some.asnumpy().any():
            raise BridgeError(
                f"{name} is all zero: no weights were loaded. Does pretrained_model_dir hold *.safetensors, or "
                "load_checkpoint name weights?"
            )
        FILLED.add(network)
    check_token_ids(args[0] if args else kwargs.get("input_ids"), network.config.vocab_size)
    with inference_device():
        return upstream(network, *args, **kwargs)


@HOOKS.wraps_upstream(load_checkpoint_utils, "process_hf_checkpoint")
def wrap_process_hf_checkpoint(
    upstream: Callable[..., str], model: Any, output_dir: str | None = None, load_checkpoint: str | None = None
) -> str:
    """``process_hf_checkpoint``, which converts nothing for Qwen3: the loaders below read Hugging Face's files.

    Stands for that function of ``mindformers/utils/load_checkpoint_utils.py`` (1.7 to 2.1), which MindFormers calls
    when a YAML has ``qkv_concat: True``: it starts a process for each file, which wait for each other, for ever if
    need be, and writes all weights anew.
    """
    if load_checkpoint is None or qwen3_network(model) is None:
        return upstream(model, output_dir, load_checkpoint)
    return load_checkpoint


@HOOKS.wraps_upstream(load_checkpoint_utils, "load_safetensors_checkpoint")
@HOOKS.wraps_upstream(base_trainer, "load_checkpoint")
@HOOKS.wraps_upstream(_CALLERS, "load_hf_checkpoint", optional=True)
def wrap_load_checkpoint(upstream: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Fills Qwen3 networks from whatever the bridge can read, when they are built and, in a parallel run, compiled.

    Stands for ``load_safetensors_checkpoint`` of ``mindformers/utils/load_checkpoint_utils.py`` (1.7 to 2.1). If a YAML
    has a ``checkpoint`` section, or ``use_legacy_format: False``, MindFormers calls ``load_hf_checkpoint`` (1.9) or
    ``load_checkpoint`` (1.7 to 2.1) of ``mindformers/checkpoint/checkpoint.py`` instead, which ignore layout flags or
    experts; their first argument is the directory. Checkpoints without layout metadata are left to upstream.
    """
    called = signature(upstream).bind(*args, **kwargs).arguments
    directory = Path(called.get("load_ckpt_path") or next(iter(called.values())))
    network = qwen3_network(called["network"])
    if network is None or not has_known_dialect(directory):
        if network is not None:
            _refuse_adapters(network, f"{directory}, which MindFormers loads itself")
        upstream(*args, **kwargs)
        return
    if "config" in called and called["config"].resume_training:
        raise BridgeError(f"{directory} holds no optimizer state: set resume_training to False")
    if "config" not in called and called.get("optimizer") is not None:
        raise BridgeError(f"{directory} holds no optimizer state, so there is nothing to resume")
    fill_network(network, directory)


def _refuse_adapters(network: Any, weights: str) -> None:
    if named_adapters(network.config) is not None:
        raise BridgeError(f"{ADAPTER_KEY} can't be merged into {weights}: give a Hugging Face directory")


@HOOKS.wraps_upstream(load_checkpoint_utils, "is_hf_safetensors_dir")
def wrap_is_hf_safetensors_dir(upstream: Callable[..., bool], safetensors_dir: str, model_cls_or_instance: Any) -> bool:
    """``is_hf_safetensors_dir``, which opens files that may be damaged, and does not name them.

    Stands for that function of ``mindformers/utils/safetensors/utils.py`` (1.7 to 2.1). What the bridge's loader reads
    is not opened before it: it names the file that is damaged.
    """
    directory, network = Path(safetensors_dir), model_cls_or_instance
    if not isinstance(network, ms.nn.Cell) or qwen3_network(network) is None or not has_known_dialect(directory):
        return upstream(safetensors_dir, model_cls_or_instance)
    header = _read_first_header(directory)
    return header is None or LAYOUT_KEY not in header[1]


@HOOKS.wraps_upstream(base_trainer.BaseTrainer, "count_parameters")
def wrap_count_parameters(upstream: Callable[..., None], trainer: Any) -> None:
    """``BaseTrainer.count_parameters``, which refuses to fine-tune from nothing.

    Stands for that method of ``mindformers/trainer/base_trainer.py`` (1.7 to 2.1), which the trainer calls when the
    network is built. MindFormers trains random weights where it finds none, whatever was asked for.
    """
    upstream(trainer)
    config, network = trainer.config, trainer.network
    weights = config.load_checkpoint
    if hasattr(base_trainer, "load_hf_checkpoint"):  # 1.9 and later have another key
        weights = (config.get("checkpoint") or {}).get("load_path")
    is_asked_for = config.run_mode == "finetune" and not config.only_save_strategy
    if not is_asked_for or weights or network is None or qwen3_network(network) is None:
        return
    directory = Path(config.pretrained_model_dir or "")
    if config.pretrained_model_dir and (directory / HF_INDEX).is_file():
        open_source(directory)  # raises if files are missing
    raise BridgeError(
        "nothing to fine-tune: MindFormers would load no weights, and train random ones. Set load_checkpoint to a "
        f"directory that holds *.safetensors (pretrained_model_dir is {config.pretrained_model_dir or 'empty'}), "
        "and leave out checkpoint.load_path or set it too; or, to begin with random weights, set run_mode: train"
    )


def qwen3_network(network: Any) -> Any:
    """The Qwen3 network within the cells that MindFormers wraps around it; None if there is none.

    None as well if the network is itself quantised, which the bridge has no weights for.
    """
    cells = (cell for _, cell in network.cells_and_names())
    found = next((cell for cell in cells if isinstance(cell, NETWORKS)), None)
    return None if _is_quantised(found) else found


def _is_quantised(network: Any) -> bool:
    """Whether MindFormers computes with quantised weights (1.7 to 1.9: only the dense inference network can)."""
    return getattr(network, "quant_config", None) is not None


def has_known_dialect(path: Path) -> bool:
    """Whether these are weights whose dialect is certain: Hugging Face's, or with the bridge's layout metadata."""
    if (path / HF_INDEX).is_file():
        return True
    header = _read_first_header(path)
    if header is None:
        return (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    names, metadata = header
    return LAYOUT_KEY in metadata or any(map(is_hf_name, names))


def _read_first_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]] | None:
    """Reads the first file of weights that can be read. Loading finds out about others."""
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        if file.name != HYPER_PARAMETERS:
            with suppress(BridgeError):
                return read_header(file)
    return None


def fill_network(network: Any, weights: Path) -> None:
    """Fills a Qwen3 network of any kind; of a training network that MindSpore divided, this rank's part."""
    model = check_against_network(network, weights)
    if isinstance(network, INFERENCE_NETWORKS):
        load_network(network, model)
        return
    if PYNATIVE_NETWORK and isinstance(network, PYNATIVE_NETWORK):
        load_pynative_network(network, model)
        return
    is_divided = ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
    strategy = Path(ms.get_auto_parallel_context("strategy_ckpt_save_file")) if is_divided else None
    load_training_network(network, model, strategy)


def check_against_network(network: Any, weights: Path) -> CheckedCheckpoint:
    """Checks weights against the config that a network was built from; BridgeError lists everything that differs."""
    declared = {key: value for key, value in vars(network.config).items() if key not in LAYOUT_FLAGS}
    adapters = named_adapters(network.config)
    if isinstance(network, INFERENCE_NETWORKS):  # a training network's flags are its own, not the weights'
        declared |= declared_layout_flags(network.config)
    model = check_against_config(weights, declared, "the network (YAML, else config.json)", adapters)
    for adapter in model.source.adapters:
        logger.info("adapter %s", adapter.description)
    for note in model.notes:
        logger.info("%s: %s", weights, note)
    return model
