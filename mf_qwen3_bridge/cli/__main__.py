"""``python -m mf_qwen3_bridge.cli``: the same as ``mf-qwen3``."""

from mf_qwen3_bridge.cli.main import main

if __name__ == "__main__":
    main()
