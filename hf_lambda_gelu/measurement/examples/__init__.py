"""Makes inputs for a transformers model that came without any: `choice.example_inputs`."""
