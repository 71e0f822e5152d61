"""Proofs about ReLU networks: sound bounds, exact solvers, local robustness, the distance to the smooth network."""
