from __future__ import annotations

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from e5v_st.cli import main
from e5v_st.index.image_folders import find_images
from e5v_st.index.source import open_source


def test_a_folder_is_embedded_whole_and_what_is_left_out_is_said(model, small, pictures, tmp_path, capsys):
    folder, image = tmp_path / "photos", Image.open(pictures[0]).convert("RGB")
    kinds = ["avif", "jfif", "jp2", "JPE", "mpo", "ppm", "tga", "pcx", "ico", "webp", "qoi"]
    folder.mkdir()
    for suffix in kinds:
        image.save(folder / f"a.{suffix}")
    for name in ("a.heic", "b.HEIC", "a.svg", "a.eps", "a.h5", "a.mpg", "notes.txt", "Makefile"):
        (folder / name).touch()
    assert main(["embed", str(folder), str(tmp_path / "out"), "--model", str(small), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    rows = {row["id"]: row["embedding"] for row in pq.read_table(tmp_path / "out" / "shard-00000.parquet").to_pylist()}
    assert sorted(rows) == sorted(f"a.{suffix}" for suffix in kinds)
    for name, embedding in rows.items():
        with Image.open(folder / name) as stored:
            np.testing.assert_allclose(embedding, model.encode(stored.convert("RGB")), atol=1e-5)
    assert "left out: 8 files that Pillow does not read as images: 1 .eps (a PostScript drawing" in printed
    assert "2 .heic (HEIC: convert it to JPEG or PNG first), 1 .svg (a vector drawing" in printed
    assert all(kind in printed for kind in ("1 .h5", "1 .mpg", "1 .txt", "1 without a suffix"))


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="photos has no images; it is empty"):
        open_source(str(tmp_path / "photos"))
    (tmp_path / "photos" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"has no images; left out: 1 files .* 1 .heic \(HEIC: convert"):
        open_source(str(tmp_path / "photos"))


def test_links_are_followed_and_loops_end(tmp_path):
    photos, other = tmp_path / "photos", tmp_path / "other"
    for folder in (photos / "real", other / "deep"):
        folder.mkdir(parents=True)
    for place in (photos / "real" / "a.png", other / "b.png", other / "deep" / "c.png"):
        place.touch()
    (photos / "file.png").symlink_to(other / "b.png")
    (photos / "album").symlink_to(other)  # outside: under the name of the link
    (photos / "first").symlink_to(photos / "real")  # inside: under its own name, though the link's comes before
    (photos / "again").symlink_to(other / "deep")
    (photos / "loop").symlink_to(photos)
    (other / "deep" / "up").symlink_to(tmp_path)
    (other / "deep" / "back").symlink_to(other)
    files, left_out = find_images(photos)
    names = ["album/b.png", "again/c.png", "file.png", "real/a.png"]
    assert [file.relative_to(photos).as_posix() for file in files] == sorted(names)
    # first, loop, and what leads back from `other`
    assert left_out == "left out: 3 links to folders that are here already"


def test_folders_that_cannot_be_opened_are_said(tmp_path, monkeypatch):
    (tmp_path / "closed\n").mkdir()
    (tmp_path / "a.png").touch()
    stock = os.scandir

    def scandir(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stock(path)

    monkeypatch.setattr(os, "scandir", scandir)
    files, left_out = find_images(tmp_path)
    assert files == [tmp_path / "a.png"]
    assert left_out == f"left out: 1 folders that cannot be opened: {tmp_path}/closed\\n"
