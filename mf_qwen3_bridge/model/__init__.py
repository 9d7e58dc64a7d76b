"""What a Qwen3 model is: its numbers, tensor names, layouts and shards. Pure: no file, no framework."""
