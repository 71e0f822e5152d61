"""Checks of the exact solvers against each other and against what is slow and sure."""
