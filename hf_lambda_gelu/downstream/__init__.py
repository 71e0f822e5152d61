"""What one wants a ReLU network for: real tools, each an extra, imported where used. May import `checkpoints` and below."""
