"""Compensated substitution without training: a measurement of its own, with its own tasks."""
