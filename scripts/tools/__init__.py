"""What the scripts stand on: models and data from packages, model cards, tables, processes."""
