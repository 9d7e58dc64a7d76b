"""Writes checkpoints: jobs, file layout, crash-safe output directories, several workers."""
