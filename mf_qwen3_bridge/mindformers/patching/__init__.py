"""Installs the bridge's hooks on MindFormers' classes, and removes them."""
