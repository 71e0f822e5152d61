"""What users and maintainers run, from the repository's root: `python -m scripts.NAME`. No part of the installed package."""
