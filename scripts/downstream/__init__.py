"""What ReLU unlocks: each tool on the smooth network, on the λ-GELU one and on the ReLU one, in one run and one table."""
