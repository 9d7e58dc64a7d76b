"""The only part of the bridge that imports MindSpore and MindFormers."""
