"""Many items from anything that holds them: datasets, columns, generators; windows; threads that read."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from e5v_st import encode_all, reading
from e5v_st.encoder import stream_all


def image_rows(cells):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": cell, "path": None} for cell in cells]})
    return rows.cast_column("image", datasets.Image())


def test_a_window_of_texts_is_some_batches(model):
    read = []
    texts = (read.append(number) or {"text": f"text {number}"} for number in range(100))
    stream = stream_all(model, texts, window=2, batch_tokens=80, progress=False)
    next(stream)
    assert len(read) == 2 * 20  # this window and the next; 8 batches of 80 tokens, 32 a text
    assert sum(1 for _ in stream) == 99


def test_a_window_of_large_images_is_bounded_by_their_memory(model, monkeypatch, tmp_path, pictures):
    monkeypatch.setattr(reading, "WINDOW_BYTES", 4 * 4500)
    picture = Image.new("RGB", (40, 25), "red")  # 1000 pixels
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    kinds = [
        picture,
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        data,
        {"image": data, "text": "blue"},
        np.array(picture),
    ]
    kinds += [
        io.BytesIO(data),
        {"image": io.BytesIO(data)},
        "data:image/png;base64," + base64.b64encode(data).decode(),
        {"image": [picture]},
        {"bytes": data, "path": None},
        {"role": "user", "content": [{"type": "text", "text": "red"}, {"type": "image", "image": picture}]},
    ]
    for item in kinds:
        read = []
        stream = stream_all(model, (read.append(number) or item for number in range(20)), progress=False)
        next(stream)
        assert len(read) == 10, item  # this window and the next, of 4.5 images and what is begun each
        assert sum(1 for _ in stream) == 19
    results = list(stream_all(model, [pictures[0], "missing.png", {"image": 3}], progress=False, on_error="skip"))
    assert [result.error is None for result in results] == [True, True, False]


def test_a_data_set_with_a_bad_image_is_read_row_by_row(model, pictures):
    datasets = pytest.importorskip("datasets")
    cells = [Path(pictures[0]).read_bytes(), b"no image", Path(pictures[1]).read_bytes()]
    rows = datasets.Dataset.from_dict({"image": [{"bytes": cell, "path": None} for cell in cells]})
    rows = rows.cast_column("image", datasets.Image())
    found = encode_all(model, rows, on_error="skip", progress=False)
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False]
    np.testing.assert_allclose(found[[0, 2]], model.encode(pictures[:2]), atol=1e-5)
    one = encode_all(model, rows.select([0]).to_iterable_dataset(), progress=False)
    np.testing.assert_allclose(one, found[:1], atol=1e-5)


def test_a_column_of_a_dataset_is_many_items(model, pictures):
    cells = [Path(picture).read_bytes() for picture in pictures[:2]]
    rows = image_rows(cells).add_column("text", ["A dog.", "A cat."])
    for columns in (rows, rows.to_iterable_dataset()):
        found = encode_all(model, columns["image"], progress=False)
        np.testing.assert_allclose(found, model.encode(pictures[:2]), atol=1e-5)
        found = encode_all(model, columns["text"], progress=False)
        np.testing.assert_allclose(found, model.encode(["A dog.", "A cat."]), atol=1e-5)


def test_a_bad_image_in_a_column_is_a_bad_item(model, pictures):
    datasets = pytest.importorskip("datasets")
    rows = image_rows([Path(pictures[0]).read_bytes(), b"no image", Path(pictures[1]).read_bytes()])
    nested = datasets.Dataset.from_dict(
        {"a": [{"b": cell} for cell in rows.cast_column("image", datasets.Image(decode=False))["image"]]}
    )
    nested = nested.cast_column("a", {"b": datasets.Image()})
    several = datasets.Dataset.from_dict(
        {"image": [[row["image"]] for row in rows.cast_column("image", datasets.Image(decode=False))]}
    )
    several = several.cast_column("image", datasets.List(datasets.Image()))
    expected = model.encode(pictures[:2])
    for items in (rows["image"], rows.to_iterable_dataset()["image"], nested["a"]["b"], several):
        found = encode_all(model, items, on_error="skip", progress=False)
        assert np.isnan(found).all(axis=1).tolist() == [False, True, False]
        np.testing.assert_allclose(found[[0, 2]], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"^item 1: .*cannot identify"):
        encode_all(model, rows["image"], progress=False)


def test_the_mode_that_a_dataset_decodes_to_is_kept(model, pictures):
    datasets = pytest.importorskip("datasets")
    rows = image_rows([Path(pictures[0]).read_bytes()]).cast_column("image", datasets.Image(mode="L"))
    with Image.open(pictures[0]) as image:
        expected = model.encode([image.convert("L")])
    np.testing.assert_allclose(encode_all(model, rows, progress=False), expected, atol=1e-5)
    np.testing.assert_allclose(encode_all(model, rows["image"], progress=False), expected, atol=1e-5)


def test_a_map_style_data_set_ends_at_its_length(model):
    class Rows:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return f"text {index}"

    assert len(encode_all(model, Rows(), progress=False)) == 3


@pytest.mark.parametrize(
    "item",
    [
        "a dog",
        b"a dog",
        bytearray(b"a dog"),
        {"text": "a dog"},
        io.BytesIO(b"a dog"),
        Path("dog.png"),
        Image.new("RGB", (3, 3)),
        np.zeros((3, 3, 3), np.uint8),
        np.zeros((3, 3), np.uint8),
        pd.DataFrame({"text": ["a dog"]}),
    ],
)
def test_a_single_item_is_not_taken_for_many(model, item):
    with pytest.raises(TypeError, match="got a single item"):
        encode_all(model, item, progress=False)


def test_a_thread_that_dies_while_reading_names_its_item_and_hangs_nothing(model, monkeypatch):
    stock = reading.read_items

    def read(values, *args):
        if values[0] == "b":
            raise ZeroDivisionError("simulated")
        return stock(values, *args)

    monkeypatch.setattr(reading, "read_items", read)
    with pytest.raises(RuntimeError, match=r"item 1 could not be read: ZeroDivisionError\('simulated'\)"):
        encode_all(model, ["a", "b", *"c" * 600], progress=False)
