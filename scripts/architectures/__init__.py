"""Every architecture of transformers, tiny and with random weights: what the package makes of each."""
