"""The refit against a slow reference, on every architecture and under the conditions in which users run it."""
