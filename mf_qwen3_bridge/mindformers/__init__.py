"""Builds, fills and verifies MindFormers' networks. No other room imports MindSpore or MindFormers."""
