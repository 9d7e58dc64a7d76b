"""What the user points at (config.json, YAML, checkpoint, ranks' files): identified, then checked."""
