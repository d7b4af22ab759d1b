"""Real Linux machines as pytest fixtures."""
