"""`python -m hf_lambda_gelu.cli` is `hf-lambda-gelu`."""

from . import main

if __name__ == "__main__":
    main()
