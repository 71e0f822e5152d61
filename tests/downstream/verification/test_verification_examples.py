"""The examples in the docstrings say what Python says."""

from __future__ import annotations

import doctest
import importlib

import pytest

import hf_lambda_gelu as hlg


@pytest.mark.parametrize("name", ["certified_distance", "feed_forward", "verify_robustness"])
def test_docstring(name: str) -> None:
    value = getattr(hlg, name)
    home = importlib.import_module(value.__module__)
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(value, name, module=home, globs={}) if test.examples]
    assert tests
    assert not any(doctest.DocTestRunner(verbose=False).run(test).failed for test in tests)
