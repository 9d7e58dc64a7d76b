"""Runs a YAML as upstream's ``run_mindformer.py`` does: python trainer.py --config YAML [--register_path DIR] ...

That script is not in MindFormers' wheels. What it does beside parsing its arguments is this.
"""

from __future__ import annotations

import argparse
import os

from mindformers.core.context import build_context
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--register_path")
    parser.add_argument("--predict_data", nargs="+")
    arguments = parser.parse_args()
    if arguments.register_path:
        os.environ["REGISTER_PATH"] = arguments.register_path
    config = MindFormerConfig(arguments.config)
    build_context(config)
    trainer = Trainer(config)
    if config.run_mode == "predict":
        data = arguments.predict_data
        trainer.predict(predict_checkpoint=config.load_checkpoint, input_data=data, batch_size=None)
    else:
        trainer.train()


if __name__ == "__main__":
    main()
