"""The held-out images of the small benchmark, for commands that need some images: the demo, and the probes.

They are of two kinds. A held-out *combination* is a concept that training has shown, with a skin tone or a gender that
training has not shown of it. An unseen *concept* was not in training at all, neither its images nor its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

COMBINATION, CONCEPT = "combination", "concept"


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery: its name, its PNG file, and what of it training has not seen (see above)."""

    name: str
    png: bytes
    unseen: str


def read_gallery() -> tuple[list[GalleryImage], tuple[GalleryImage, str]]:
    """Returns the held-out images of the small benchmark, and one composed query: an image and a modification text."""
    import pyarrow.parquet as pq

    folder = resources.files("e5v_st.mteb_tasks") / "data"
    columns = ["id", "image", "name", "split", "gallery"]
    with (folder / "emoji.parquet").open("rb") as file:
        rows = pq.read_table(file, columns=columns).to_pylist()
    images = {row["id"]: GalleryImage(row["name"], row["image"], row["split"]) for row in rows}
    gallery = [images[row["id"]] for row in rows if row["gallery"] and row["split"] in (COMBINATION, CONCEPT)]
    with (folder / "composed.parquet").open("rb") as file:
        triplets = pq.read_table(file).to_pylist()
    triplet = next(row for row in triplets if row["split"] == COMBINATION and row["change"] == "tone")
    return gallery, (images[triplet["reference"]], triplet["text"])
