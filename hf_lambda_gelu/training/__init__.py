"""transformers' Trainer with λ: learned, hardened, substituted, published. May import `checkpoints` and what is below."""
