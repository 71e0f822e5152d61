"""Prints the oldest versions that pyproject.toml declares, as a constraints file: `make test-oldest` installs these.

Every requirement with a lower bound, of the package and of all its extras, becomes `name==bound`. A package that another
one requires newer than its own bound says makes pip refuse: then the bound is wrong and must be raised.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def bounds(pyproject: dict[str, Any]) -> dict[str, str]:
    """{package: lower bound} of what this machine would install.

    Raises:
        ValueError: a requirement has no lower bound, so that nobody can say what its oldest version is.
    """
    project = pyproject["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:  # an extra that takes in another
            continue
        if requirement.marker and not requirement.marker.evaluate(dict(default_environment())):
            continue
        lower = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
        if len(lower) != 1:
            raise ValueError(f"pyproject.toml: {str(requirement)!r} has no lower bound; write {requirement.name}>=VERSION")
        if found.setdefault(requirement.name, lower[0]) != lower[0]:
            raise ValueError(
                f"pyproject.toml: {requirement.name} has two lower bounds, {found[requirement.name]}, {lower[0]}"
            )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.tools.oldest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME==VERSION", help="another version for one package"
    )
    arguments = parser.parse_args(argv)
    found = bounds(tomllib.loads(PYPROJECT.read_text(encoding="utf-8")))
    for text in arguments.set:
        name, _, version = text.partition("==")
        if name not in found or not version:
            parser.error(f"--set takes NAME==VERSION of a package in pyproject.toml, got {text!r}")
        found[name] = version
    print("\n".join(f"{name}=={version}" for name, version in sorted(found.items())))


if __name__ == "__main__":
    main()
