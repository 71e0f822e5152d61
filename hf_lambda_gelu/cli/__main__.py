"""`python -m hf_lambda_gelu.cli` is `hf-lambda-gelu`."""

from . import main

main()
