"""Folders and the Hub: saved, proven, published, converted on disk. May import `surgery` and what is below."""
