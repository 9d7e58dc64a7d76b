"""From headers to bytes: safetensors files, the plan, tiles, copying, value checks, progress."""
