"""Optimizer × precision × engine × trainer: λ of each run beside that of its twin, or the text of the refusal."""
