"""What λ-GELU and the refit cost, in time and memory."""
