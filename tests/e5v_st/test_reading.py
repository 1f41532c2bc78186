"""Many items from anything that holds them: datasets, columns, generators; windows; threads that read."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageSequence

import e5v_st
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


def frames(tmp_path):
    """A GIF of five colours, its path, and Pillow's own copy of each frame."""
    colours = ["red", "green", "blue", "white", "black"]
    first, *others = [Image.new("RGB", (30, 20), colour) for colour in colours]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    with Image.open(tmp_path / "a.gif") as gif:
        return tmp_path / "a.gif", [frame.convert("RGB") for frame in ImageSequence.all_frames(gif)]


def test_the_frames_of_an_animation_are_read_when_their_turn_comes(model, tmp_path):
    path, copies = frames(tmp_path)
    expected = model.encode(copies)
    assert not np.allclose(expected[0], expected[4], atol=1e-3)
    with Image.open(path) as gif:
        found = encode_all(model, ImageSequence.Iterator(gif), progress=False)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        found = encode_all(model, ({"image": [frame]} for frame in ImageSequence.Iterator(gif)), progress=False)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def reuse(kind, copies):
    """Yields one object again and again with another image in it."""
    array, item, file = np.zeros((20, 30, 3), np.uint8), {"image": None}, io.BytesIO()
    messages = [{"role": "user", "content": [{"type": "image", "image": array}]}]
    for image in copies:
        array[:] = np.asarray(image)
        item["image"] = image
        file.seek(0)
        image.save(file, "bmp")
        yield {"array": array, "tensor": torch.from_numpy(array), "dict": item, "file": file, "chat": messages}[kind]


@pytest.mark.parametrize("kind", ["array", "tensor", "dict", "file", "chat"])
def test_what_an_iterator_uses_again_is_read_as_it_was(model, tmp_path, kind):
    _, copies = frames(tmp_path)
    found = encode_all(model, reuse(kind, copies), progress=False)
    np.testing.assert_allclose(found, model.encode(copies), atol=1e-5)


def test_an_image_may_be_closed_behind_its_yield(model, pictures):
    def opened():
        for picture in pictures[:3]:
            with Image.open(picture) as image:
                yield image

    np.testing.assert_allclose(encode_all(model, opened(), progress=False), model.encode(pictures[:3]), atol=1e-5)


def test_deep_pixels_of_an_iterator_are_read_with_what_their_file_declares(model, tmp_path):
    ramp = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(ramp).save(tmp_path / "a.pgm")
    found = encode_all(model, (Image.open(path) for path in [tmp_path / "a.pgm"]), progress=False)
    eight = Image.fromarray((ramp >> 8).astype(np.uint8)).convert("RGB")
    np.testing.assert_allclose(found, model.encode([eight]), atol=1e-5)


def test_a_bad_item_of_an_iterator_keeps_its_error_and_its_place(model, pictures):
    data = Path(pictures[0]).read_bytes()
    good = Path(pictures[1])
    items = [good, Image.open(io.BytesIO(data[: len(data) // 2])), io.StringIO("text"), good]
    with Image.open(pictures[0]) as closed:
        items.append(closed)
    results = list(stream_all(model, iter(items), on_error="skip", progress=False))
    assert [result.error is None for result in results] == [True, False, False, True, False]
    for place, message in [(1, "truncated"), (2, "binary mode"), (4, "cannot read a PngImageFile")]:
        assert results[place].error.startswith(f"item {place}: cannot read")
        assert message in results[place].error
    with pytest.raises(ValueError, match=r"^item 1: cannot read"):
        encode_all(model, iter(items[:2]), progress=False)


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


def test_the_transform_of_a_dataset_gets_its_images(model, pictures):
    def turn(batch):
        return {"image": [image.transpose(Image.Transpose.ROTATE_90) for image in batch["image"]]}

    rows = image_rows([Path(picture).read_bytes() for picture in pictures[:2]]).with_transform(turn)
    expected = model.encode([Image.open(picture).transpose(Image.Transpose.ROTATE_90) for picture in pictures[:2]])
    for items in (rows, rows["image"]):
        np.testing.assert_allclose(encode_all(model, items, progress=False), expected, atol=1e-5)


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


def test_the_messages_of_one_chat_are_not_taken_for_many_items(model):
    chat = [{"role": "system", "content": "Of a film: "}, {"role": "user", "content": "a dog"}]
    with pytest.raises(TypeError, match="got the messages of one chat, want an iterable of items"):
        encode_all(model, chat, progress=False)
    with pytest.raises(TypeError, match="got the messages of one chat"):
        e5v_st.words(model, chat)
    assert encode_all(model, [chat], progress=False).shape == (1, model.get_embedding_dimension())


def test_what_holds_no_items_is_refused(model):
    with pytest.raises(TypeError, match="got a int, want an iterable of items, such as a list"):
        encode_all(model, 5, progress=False)


def test_a_thread_that_dies_while_reading_names_its_item_and_hangs_nothing(model, monkeypatch):
    stock = reading.read_items

    def read(values, *args):
        if values[0] == "b":
            raise ZeroDivisionError("simulated")
        return stock(values, *args)

    monkeypatch.setattr(reading, "read_items", read)
    with pytest.raises(RuntimeError, match=r"item 1 could not be read: ZeroDivisionError\('simulated'\)"):
        encode_all(model, ["a", "b", *"c" * 600], progress=False)
