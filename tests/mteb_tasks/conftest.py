"""Small data sets in the published schema, and models to measure."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CATEGORIES = ("dress", "shirt", "toptee")
#: The caption pairs of the goldens, for their first two images.
CAPTION_PAIRS = [["is red.", "has stripes, "], ["is longer", "is darker?"]]
STS_FILES = {
    **{f"mteb/sts{year}-sts": "test.jsonl.gz" for year in range(12, 17)},
    **{"mteb/stsbenchmark-sts": "test.jsonl.gz", "mteb/sickr-sts": "test.json.gz"},
}
GALLERY_OF_TEST = 60


def png(folder: Path) -> list[dict[str, Any]]:
    """The golden images as ``datasets`` stores them."""
    return [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(folder.glob("*.png"))]


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)) for _ in range(count)]


def write(folder: Path, repo: str, columns: dict[str, dict[str, list]], images: Sequence[str] = ()) -> None:
    """Writes a data set as ``push_to_hub`` lays it out: ``data/<split>-…parquet``, and a README with the splits."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    place = folder / repo
    (place / "data").mkdir(parents=True)
    for split, own in columns.items():
        data = Dataset.from_dict(own)
        for column in images:
            data = data.cast_column(column, ImageFeature())
        data.to_parquet(place / "data" / f"{split}-00000-of-00001.parquet")
    entries = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in columns)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{entries}---\n"
    (place / "README.md").write_text(card, encoding="utf8")


def write_published(folder: Path, goldens: Path) -> Path:
    """Writes every data set that the tasks read, made of the goldens' images and texts."""
    numbers = np.load(goldens / "small.upstream.npz")
    images, texts = png(goldens / "images" / "small"), [str(text) for text in numbers["texts"]]
    changes = [str(change) for change in numbers["changes"]]
    ids = [f"img{i}" for i in range(len(images))]
    captions = [[f"{texts[(i + n) % len(texts)]} {i} {n}" for n in range(6)] for i in range(len(images))]
    write(folder, "royokong/coco_test", {"test": {"image": images, "text": captions}}, ["image"])
    five = [own[:5] for own in captions]
    write(folder, "royokong/flickr30k_test", {"test": {"image": images, "text": five}}, ["image"])

    pairs = [(i, change) for i in range(len(images)) for change in changes]
    asked = {
        "candidate": [images[i] for i, _ in pairs],
        "candidate_id": [ids[i] for i, _ in pairs],
        "caption": [change for _, change in pairs],
    }
    targets = [ids[(i + 1) % len(ids)] for i, _ in pairs]
    write(folder, "royokong/cirr_val", {"val": {**asked, "target_id": targets}}, ["candidate"])
    test = {**asked, "candidate_id": [f"test{i}" for i, _ in pairs], "pairid": list(range(len(pairs)))}
    write(folder, "royokong/cirr_test", {"test": test}, ["candidate"])
    gallery = {"id": [f"test{i}" for i in range(GALLERY_OF_TEST)], "img": noise(GALLERY_OF_TEST)}
    write(folder, "royokong/cirr_imgs", {"val": {"id": ids, "img": images}, "test": gallery}, ["img"])

    fashion = {
        "candidate": images[:2] * 3,
        "caption": CAPTION_PAIRS * 3,
        "target_id": [f"{category}{i}" for category in CATEGORIES for i in (3, 4)],
        "category": [category for category in CATEGORIES for _ in range(2)],
    }
    write(folder, "royokong/fashioniq_val", {"val": fashion}, ["candidate"])
    gallery = {
        "id": [f"{category}{i}" for category in CATEGORIES for i in range(len(images))],
        "img": images * 3,
        "category": [category for category in CATEGORIES for _ in images],
    }
    write(folder, "royokong/fashioniq_val_imgs", {"val": gallery}, ["img"])

    rng = np.random.default_rng(0)
    for repo, name in STS_FILES.items():
        count = 4927 if "sickr" in repo else 20
        rows = [
            {"sentence1": texts[i % 9], "sentence2": f"{texts[i % 7]} {i % 40}", "score": float(rng.integers(0, 6))}
            for i in range(count)
        ]
        (folder / repo).mkdir(parents=True)
        with gzip.open(folder / repo / name, "wt", encoding="utf8") as file:
            file.write("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, goldens: Path) -> Path:
    """A folder that holds every published data set, small."""
    return write_published(tmp_path_factory.mktemp("published"), goldens)


@pytest.fixture
def local_data(published: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has the tasks read the small data sets."""
    monkeypatch.setenv("E5V_DATA", str(published))
    return published


@pytest.fixture(scope="session")
def e5v(small: Path) -> Any:
    """The encoder on the ``small`` checkpoint, without a store: do not change it."""
    import mteb

    from e5v_st.mteb_tasks.models import make_meta

    assert mteb.__version__
    return make_meta(str(small), store=False).load_model(device="cpu")


class Given:
    """A model whose embeddings are given, by role (``query``, ``document``) and id."""

    def __init__(self, tables: dict[str, dict[str, np.ndarray]]) -> None:
        from mteb.models.model_meta import ModelMeta

        self.tables = tables
        self.mteb_model_meta = ModelMeta.create_empty()

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> np.ndarray:
        return np.stack([self.tables[prompt_type.value][name] for name in inputs.dataset["id"]])

    def similarity(self, one: np.ndarray, other: np.ndarray) -> Any:
        import torch

        return torch.as_tensor(one) @ torch.as_tensor(other).T

    def similarity_pairwise(self, one: np.ndarray, other: np.ndarray) -> Any:
        return self.similarity(one, other).diagonal()


@pytest.fixture
def given() -> Callable[..., Given]:
    """Makes a model of given embeddings."""
    return Given
