"""The examples in the docstrings of the public names say what Python says."""

from __future__ import annotations

import doctest
import importlib

import pytest

import hf_lambda_gelu as hlg

# rooms whose examples need no model of the Hub
ROOMS = (".activation.", ".structure.", ".downstream.sparsity", ".downstream.pruning", ".downstream.sparse_ffn")
NAMES = sorted(
    name for name, module in {**hlg._MODULES, "register": ".activation.registry"}.items() if module.startswith(ROOMS)
)


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str) -> None:
    value = getattr(hlg, name)
    home = importlib.import_module(value.__module__)
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(value, name, module=home, globs={}) if test.examples]
    assert tests, f"{name} has no example"
    results = [doctest.DocTestRunner(verbose=False).run(test) for test in tests]
    assert not any(result.failed for result in results)
