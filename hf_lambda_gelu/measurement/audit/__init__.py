"""Which activations a forward pass really ran, told by torch's operations alone."""
