"""The measurements behind the defaults and behind docs/study.md: recipes, the paper's claims, substitution untrained."""
