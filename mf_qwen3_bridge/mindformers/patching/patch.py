"""Installs the bridge's hooks on MindFormers' classes, and removes them.

Each hook is declared where it is defined, in the modules imported below. All of them:

===================================================== =========================================================
replaced                                              by
===================================================== =========================================================
``Inference*.convert_weight_dict``                    conversion by the training class, in the reader's layout
``Inference*.convert_map_dict``                       likewise, of the index
``Inference*.obtain_name_map``                        a refusal: a map of names can't fuse tensors
``Inference*.load_weights``                           the bridge's loader: everything is loaded, or an error
``Inference*.generate``                               upstream's, but not from weights that were never loaded
``AutoModel*.from_pretrained``                        the bridge's, with ``auto_convert=True``
``AutoConfig.from_pretrained``                        reads a Hugging Face directory's config.json
``Qwen3*Config.__init__``                             upstream's, given a config.json in the form that it takes
``load_checkpoint_utils.process_hf_checkpoint``       Qwen3's files stay as they are: the loaders read them
``load_checkpoint_utils.is_hf_safetensors_dir``       upstream's answer, without opening damaged files
``load_checkpoint_utils.load_safetensors_checkpoint`` the bridge's loader, where the layout is certain
``base_trainer.load_checkpoint``                      likewise, in MindFormers' newer checkpoint format
``base_trainer.load_hf_checkpoint``                   likewise (1.9 and later)
``checkpoint.load_hf_checkpoint``                     likewise, for the PyNative trainer (2.1)
``BaseTrainer.count_parameters``                      upstream's; nothing is fine-tuned from random weights
===================================================== =========================================================
"""

from mf_qwen3_bridge.mindformers.patching import configs, hooks  # noqa: F401  declare the hooks
from mf_qwen3_bridge.mindformers.replacements import HOOKS


def patch() -> None:
    """Installs the bridge's hooks on MindFormers' Qwen3 and Qwen3-MoE classes. Idempotent.

    Raises:
        BridgeError: MindFormers lacks an attribute that the bridge replaces. Nothing is changed then.

    Example::

        import mf_qwen3_bridge
        import mindspore as ms
        from mindformers import AutoModel

        mf_qwen3_bridge.patch()
        network = AutoModel.from_pretrained("demo/qwen3-demo", auto_convert=True)

        # What MindFormers calls itself when it loads weights:
        parameters = network.convert_weight_dict(mf_qwen3_bridge.load_checkpoint("demo/qwen3-demo"))
        print(ms.load_param_into_net(network, parameters))
    """
    HOOKS.install()


def unpatch() -> None:
    """Removes the hooks: MindFormers' classes are as they were. Idempotent.

    On a CPU the stand-ins for Ascend's operators stay: networks that were built go on using them.

    Example::

        import mf_qwen3_bridge
        from mindformers.models.qwen3.modeling_qwen3_infer import InferenceQwen3ForCausalLM

        upstream = InferenceQwen3ForCausalLM.load_weights
        mf_qwen3_bridge.patch()
        mf_qwen3_bridge.unpatch()
        print(InferenceQwen3ForCausalLM.load_weights is upstream)
    """
    HOOKS.uninstall()
