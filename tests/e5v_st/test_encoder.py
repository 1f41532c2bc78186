from __future__ import annotations

import base64
import io
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

import e5v_st
from e5v_st import PROMPTS, encode_all, reading
from e5v_st.encoder import stream_all


@pytest.fixture(scope="module")
def items(pictures):
    return [
        *("A dog.", "A cat standing in the snow.", "A dog."),
        *pictures[:3],
        *({"image": picture, "text": change} for picture in pictures[:3] for change in ("red", "make it snow")),
        pictures[0],
        {"text": ""},
    ]


def test_a_whole_job_equals_encoding_one_by_one(model, items):
    alone = np.stack([model.encode([item])[0] for item in items])
    for batch_tokens in (1, 200, 100_000):
        found = encode_all(model, items, batch_tokens=batch_tokens, progress=False)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_a_generator_is_read_in_windows_and_yields_in_order(model, pictures):
    items = [*pictures[:5], {"image": pictures[0], "text": "red"}]
    read = []

    def generator():
        for number in range(40):
            read.append(number)
            yield items[number % len(items)]

    stream = stream_all(model, generator(), window=8, progress=False)
    first = next(stream)
    assert first.index == 0
    assert len(read) <= 16  # this window and the one that is read ahead
    rest = list(stream)
    assert [result.index for result in rest] == list(range(1, 40))
    expected = encode_all(model, items, progress=False)
    for result in [first, *rest]:
        np.testing.assert_allclose(result.embedding, expected[result.index % len(items)], atol=1e-5)


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


@pytest.mark.parametrize("window", [1, 256])
def test_equal_items_are_computed_once_across_windows_too(model, items, monkeypatch, window):
    computed = []
    stock = model[0].collate
    monkeypatch.setattr(model[0], "collate", lambda batch, **options: computed.extend(batch) or stock(batch, **options))
    results = list(stream_all(model, items * 3, window=window, progress=False))
    assert len(computed) == len(items) - 2  # "A dog." and the first picture come twice
    np.testing.assert_array_equal(results[0].embedding, results[len(items)].embedding)


def test_embeddings_of_earlier_windows_are_kept_in_bounded_memory(model, monkeypatch):
    monkeypatch.setattr("e5v_st.encoder.RECENT_BYTES", 20 * model.get_embedding_dimension() * 4)
    computed = []
    stock = model[0].collate
    monkeypatch.setattr(model[0], "collate", lambda batch, **options: computed.extend(batch) or stock(batch, **options))
    texts = [{"text": f"text {number % 48}"} for number in range(96)]
    results = list(stream_all(model, texts, window=1, batch_tokens=64, progress=False))  # 16 texts a window
    assert len(computed) == 96  # each was pushed out by 28 others when its turn came again
    np.testing.assert_allclose([r.embedding for r in results[:48]], [r.embedding for r in results[48:]], atol=1e-5)


def test_truncated_embeddings_are_those_of_encode(small, items):
    model = e5v_st.load(small, device="cpu", truncate_dim=32)
    found = encode_all(model, items, progress=False)
    assert found.shape == (len(items), 32)
    np.testing.assert_allclose(found, model.encode(items), atol=1e-5)


def test_each_item_may_have_its_own_prompt(model, pictures):
    prompts = [PROMPTS["cirr-gallery"], None, PROMPTS["fashioniq-dress-gallery"]]
    found = encode_all(model, [pictures[0]] * 3, prompt=prompts, progress=False)
    expected = [model.encode(pictures[0], prompt=prompt) for prompt in prompts]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_bad_item_stops_the_job_by_its_index(model, items):
    results = []
    with pytest.raises(ValueError, match=r"^item 3: .*no such file"):
        results.extend(stream_all(model, [*items[:3], {"image": "missing.png"}, items[4]], progress=False))


def test_a_bad_item_is_skipped_on_request_and_reported(model, items, caplog):
    with caplog.at_level(logging.WARNING, "e5v_st"):
        found = encode_all(model, [items[0], None, items[1]], on_error="skip", progress=False)
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False]
    np.testing.assert_allclose(found[[0, 2]], model.encode(items[:2]), atol=1e-5)
    assert "1 of 3 items were skipped" in caplog.text
    assert "[1]" in caplog.text
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        encode_all(model, [], on_error="ignore")


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


def image_rows(cells):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": cell, "path": None} for cell in cells]})
    return rows.cast_column("image", datasets.Image())


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


def test_file_objects_bytes_and_data_addresses_are_the_images_that_they_hold(model, pictures):
    data = Path(pictures[0]).read_bytes()
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    with open(pictures[0], "rb") as file:
        images = [io.BytesIO(data), data, bytearray(data), file, address]
        items = [*images, *({"image": image} for image in images)]
        items += [{"role": "user", "content": [{"type": "image", "image": image}]} for image in images]
        expected = np.stack([model.encode(pictures[0])] * len(items))
        np.testing.assert_allclose(encode_all(model, items, progress=False), expected, atol=1e-5)
        np.testing.assert_allclose(model.encode(items[:10], batch_size=4), expected[:10], atol=1e-5)
        np.testing.assert_allclose([model.encode(image) for image in images], expected[:5], atol=1e-5)


def test_strings_are_texts_on_request(small, pictures, tmp_path):
    texts = [pictures[0], "data:image/png;base64,broken", "http://127.0.0.1:1/a.png"]
    model = e5v_st.load(small, device="cpu", strings="text")
    expected = model.encode([{"text": text} for text in texts])
    model.save_pretrained(str(tmp_path / "saved"))
    again = e5v_st.load(tmp_path / "saved", device="cpu")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    for loaded in (model, again, stock):
        np.testing.assert_allclose(loaded.encode(texts), expected, atol=1e-5)
        np.testing.assert_allclose(encode_all(loaded, texts, progress=False), expected, atol=1e-5)
    image = again.encode([{"image": pictures[0]}])
    np.testing.assert_allclose(
        e5v_st.load(tmp_path / "saved", device="cpu", strings="auto").encode(texts[:1]), image, atol=1e-5
    )
    with pytest.raises(ValueError, match="got strings='texts', want one of 'auto', 'text'"):
        e5v_st.load(small, strings="texts")


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


def test_prompts_are_found_by_name_as_in_encode(small, pictures):
    model = e5v_st.load(small, device="cpu")
    expected = model.encode(pictures[:1], prompt_name="cirr-gallery")
    np.testing.assert_allclose(
        encode_all(model, pictures[:1], prompt_name="cirr-gallery", progress=False), expected, atol=1e-5
    )
    with pytest.raises(ValueError, match="there is no prompt 'cirr-galery', but query, document, text, image"):
        encode_all(model, pictures[:1], prompt_name="cirr-galery", progress=False)
    model.default_prompt_name = "cirr-gallery"
    np.testing.assert_allclose(encode_all(model, pictures[:1], progress=False), expected, atol=1e-5)


def test_no_tokens_for_a_batch_are_refused(model):
    with pytest.raises(ValueError, match="got 0 tokens for a batch, want at least 1"):
        encode_all(model, ["a"], batch_tokens=0, progress=False)


def test_an_item_that_does_not_fit_the_model_is_a_bad_item(model):
    album = {"image": [Image.new("RGB", (200, 200), (number, 0, 0)) for number in range(300)]}
    with pytest.raises(ValueError, match=r"^item 2: the prompt takes 335 tokens.*room for 0"):
        model.encode(["a", "a longer text", album])
    with pytest.raises(ValueError, match=r"^item 1: the prompt takes"):
        encode_all(model, ["a", album], progress=False)
    found = encode_all(model, ["a", album, "b"], on_error="skip", progress=False)
    assert np.isnan(found).any(axis=1).tolist() == [False, True, False]


def test_fewer_prompts_than_items_are_refused(model):
    with pytest.raises(ValueError, match="shorter"):
        encode_all(model, ["a", "b", "c"], prompt=["<sent>", "<sent>"], progress=False)
    with pytest.raises(ValueError, match="got a prompt of type int, want a string"):
        encode_all(model, ["a"], prompt=[3], progress=False)


@pytest.mark.parametrize("window", [2, 256])
def test_what_came_before_a_failure_of_the_items_themselves_is_yielded(model, window):
    def items():
        for number in range(5):
            yield {"image": Image.new("RGB", (20, 20), (number, 0, 0))}
        raise ZeroDivisionError("the data base is gone")

    found = []
    with pytest.raises(ZeroDivisionError, match="the data base is gone"):
        found.extend(stream_all(model, items(), window=window, progress=False))
    assert [result.index for result in found] == [0, 1, 2, 3, 4]


def test_a_thread_that_dies_while_reading_names_its_item_and_hangs_nothing(model, monkeypatch):
    stock = reading.read_items

    def read(values, *args):
        if values[0] == "b":
            raise ZeroDivisionError("simulated")
        return stock(values, *args)

    monkeypatch.setattr(reading, "read_items", read)
    with pytest.raises(RuntimeError, match=r"item 1 could not be read: ZeroDivisionError\('simulated'\)"):
        encode_all(model, ["a", "b", *"c" * 600], progress=False)


def test_a_thread_that_dies_while_collating_names_its_items_and_hangs_nothing(model, monkeypatch):
    stock = model[0].collate

    def collate(batch, **options):
        if any(item.sentence == "b" for item in batch):
            raise ZeroDivisionError("simulated")
        return stock(batch, **options)

    monkeypatch.setattr(model[0], "collate", collate)
    with pytest.raises(RuntimeError, match=r"batch could be made of the items \[301\]: ZeroDivisionError"):
        encode_all(model, [*"a" * 301, "b"], progress=False, batch_tokens=1)


def test_encode_says_that_memory_ran_out_and_the_model_still_works(small, monkeypatch):
    model = e5v_st.load(small, device="cpu")
    expected = model.encode(["a", "b"])

    def forward(features, **kwargs):
        raise torch.OutOfMemoryError("simulated")

    with monkeypatch.context() as patch:
        patch.setattr(model[0], "forward", forward)
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            model.encode(["a", "b"])
    np.testing.assert_array_equal(model.encode(["a", "b"]), expected)


def test_nothing_gives_no_rows(model):
    assert encode_all(model, [], progress=False).shape == (0, 128)


def test_out_of_memory_halves_the_batch_and_remembers(small, items, monkeypatch, caplog):
    model = e5v_st.load(small, device="cpu")
    expected = model.encode([{"text": f"text {i}"} for i in range(32)])
    stock, sizes = model[0].forward, []

    def forward(features, **kwargs):
        sizes.append(len(features["input_ids"]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("simulated")
        return stock(features, **kwargs)

    monkeypatch.setattr(model[0], "forward", forward)
    found = encode_all(model, [{"text": f"text {i}"} for i in range(32)], batch_tokens=400, progress=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sum(size > 5 for size in sizes) <= 3
    assert "out of memory" in caplog.text


def test_a_single_item_that_does_not_fit_raises(small, monkeypatch):
    model = e5v_st.load(small, device="cpu")

    def forward(features, **kwargs):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(model[0], "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        encode_all(model, ["a", "b"], progress=False)


def test_a_single_item_that_does_not_fit_is_skipped_on_request(small, monkeypatch):
    model = e5v_st.load(small, device="cpu")
    stock = model[0].forward

    def forward(features, **kwargs):
        if features["input_ids"].shape[1] > 100:
            raise torch.OutOfMemoryError("simulated")
        return stock(features, **kwargs)

    monkeypatch.setattr(model[0], "forward", forward)
    results = list(stream_all(model, ["a", "long " * 200, "b"], on_error="skip", progress=False))
    assert [result.error for result in results] == [None, "item 1: simulated", None]


# ---- any SentenceTransformer ----


@pytest.fixture(scope="module")
def native(small, tmp_path_factory):
    from sentence_transformers import SentenceTransformer

    from e5v_st.hub.export import export

    folder = export(small, tmp_path_factory.mktemp("native") / "native", native=True)
    return SentenceTransformer(str(folder), device="cpu")


def test_a_native_export_gives_what_the_model_gives(model, native, items):
    native_items = [
        Image.open(item).convert("RGB") if isinstance(item, str) and item[0] == "/" else item for item in items
    ]
    expected = encode_all(model, items, progress=False)
    assert not hasattr(native[0], "collate")
    np.testing.assert_allclose(encode_all(native, native_items, progress=False), expected, atol=1e-5)
    np.testing.assert_allclose(native.encode(native_items), expected, atol=1e-5)


def test_a_stock_model_keeps_order_prompts_and_places_of_bad_items(native, pictures):
    texts = [{"text": f"text {number}"} for number in range(5)]
    prompts = ["Query: ", None, "Query: ", "Passage: ", None]
    found = list(stream_all(native, iter(texts), prompt=prompts, window=2, progress=False))
    expected = [native.encode(text, prompt=prompt) for text, prompt in zip(texts, prompts, strict=True)]
    assert [result.index for result in found] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([result.embedding for result in found], expected, atol=1e-5)

    broken = [texts[0], {"nothing": 1}, texts[2]]
    with pytest.raises(ValueError, match="item 1: "):
        encode_all(native, broken, progress=False)
    rows = encode_all(native, broken, on_error="skip", progress=False)
    assert np.isnan(rows[1]).all()
    np.testing.assert_allclose(rows[[0, 2]], native.encode([texts[0], texts[2]]), atol=1e-5)

    def failing():
        yield texts[0]
        raise KeyError("mine")

    stream = stream_all(native, failing(), progress=False)
    np.testing.assert_allclose(next(stream).embedding, native.encode(texts[0]), atol=1e-5)
    with pytest.raises(KeyError, match="mine"):
        next(stream)


def test_a_model_that_is_none_is_refused_in_words(model, native, small):
    for wrong in (str(small), model[0]):
        with pytest.raises(TypeError, match=f"got a {type(wrong).__name__} as the model, want a SentenceTransformer"):
            encode_all(wrong, ["A dog."])
    with pytest.raises(ValueError, match="batch_tokens=7 for a model that is not loaded as an E5-V"):
        encode_all(native, ["A dog."], batch_tokens=7)
    with pytest.raises(TypeError, match="a single item"):
        encode_all(native, "A dog.")


def test_a_whole_job_keeps_the_maximum_length_that_the_model_was_made_with(small):
    model = e5v_st.load(small, device="cpu")
    long = {"text": "A dog sits in the grass. " * 20}
    free = model.encode([long])
    model[0].processing_kwargs = {"text": {"max_length": 45}}
    np.testing.assert_allclose(encode_all(model, [long], progress=False), model.encode([long]), atol=1e-5)
    assert np.abs(model.encode([long]) - free).max() > 1e-3
    model[0].processing_kwargs = {"text": {"truncation": False}}
    with pytest.raises(ValueError, match="truncation"):
        encode_all(model, [long], progress=False)
