"""What a model is made of, and the only place that edits it. May import `activation`."""
