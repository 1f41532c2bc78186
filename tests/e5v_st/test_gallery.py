"""The held-out images of the small benchmark."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from e5v_st.gallery import read_gallery

DATA = Path(__file__).parents[2] / "mteb_tasks" / "data"


def test_the_gallery_is_what_the_benchmark_holds_out():
    gallery, (reference, change) = read_gallery()
    rows = pq.read_table(DATA / "emoji.parquet").to_pylist()
    held_out = [row for row in rows if row["gallery"] and row["split"] in ("combination", "concept")]
    assert [(image.name, image.png) for image in gallery] == [(row["name"], row["image"]) for row in held_out]
    assert Counter(image.unseen for image in gallery) == {"combination": 213, "concept": 172}
    assert reference.png in {row["image"] for row in rows}
    assert change.startswith("change the skin tone")


def test_it_is_found_without_importing_mteb():
    code = "import sys; from e5v_st.gallery import read_gallery; read_gallery(); assert 'mteb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
