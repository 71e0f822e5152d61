"""What computes λ-GELU: the choice, one compiled kernel for CPUs, one for CUDA, and torch's own operations."""
