"""Whole jobs: any order, batch size and window, repeated and bad items."""

from __future__ import annotations

import base64
import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

import e5v_st
from e5v_st import PROMPTS, encode_all
from e5v_st.encoder import stream_all


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


def test_an_embedding_that_is_not_finite_is_an_error_that_names_the_dtype(small):
    model = e5v_st.load(small, device="cpu", model_kwargs={"dtype": "float16"})
    for name, weight in model.named_parameters():  # a product of them is above 65504, the largest float16
        if "language_model" in name and name.endswith(("up_proj.weight", "gate_proj.weight", "down_proj.weight")):
            weight.data.fill_(100)
    assert np.isnan(model.encode("A dog.")).any()
    message = "item 0: its embedding is not finite in float16: load the model in bfloat16 or float32"
    results = list(stream_all(model, ["A dog.", None], on_error="skip", progress=False))
    assert [result.embedding for result in results] == [None, None]
    assert results[0].error == message
    with pytest.raises(ValueError, match=f"^{message}$"):
        encode_all(model, ["A dog."], progress=False)
    assert np.isfinite(encode_all(model.bfloat16(), ["A dog."], progress=False)).all()


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


def test_without_a_prompt_of_its_own_an_item_has_the_models_default(small):
    model = e5v_st.load(small, device="cpu")
    model.default_prompt_name = "sts"
    found = encode_all(model, ["a dog", "a cat"], prompt=[None, PROMPTS["text"]], progress=False)
    expected = [model.encode("a dog", prompt_name="sts"), model.encode("a cat", prompt=PROMPTS["text"])]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_more_or_fewer_prompts_than_items_are_refused(model, count):
    prompts = ["<sent>"] * count
    with pytest.raises(ValueError, match=f"got {count} prompts for 3 items, want one for each item"):
        encode_all(model, ["a", "b", "c"], prompt=prompts, progress=False)
    got = "got 2 prompts for more items than that" if count == 2 else "got more than 3 prompts for 3 items"
    with pytest.raises(ValueError, match=f"{got}, want one for each item"):
        encode_all(model, (text for text in "abc"), prompt=iter(prompts), progress=False)


def test_prompts_that_are_no_texts_are_refused(model):
    with pytest.raises(TypeError, match="got a int as the prompt, want a text, or a list with one for each item"):
        encode_all(model, ["a"], prompt=3, progress=False)
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
