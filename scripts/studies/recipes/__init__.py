"""Ways to end with a ReLU network, one function each; scripts/studies/run.py imports the files, which registers them."""
