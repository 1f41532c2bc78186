"""``encode_all`` with any SentenceTransformer: what its own ``encode`` gives."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from e5v_st import encode_all
from e5v_st.encoder import stream_all


@pytest.fixture(scope="module")
def native(small, tmp_path_factory):

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


def test_what_an_iterator_uses_again_is_read_as_it_was_by_a_stock_model_too(native, pictures):
    copies = [Image.open(picture).convert("RGB").resize((40, 30)) for picture in pictures[:3]]
    item = {"image": copies[0].copy()}

    def reused():
        for image in copies:
            item["image"].paste(image)
            yield item
        with Image.open(io.BytesIO(Path(pictures[0]).read_bytes()[:100])) as broken:
            yield broken

    results = list(stream_all(native, reused(), on_error="skip", progress=False))
    np.testing.assert_allclose([result.embedding for result in results[:3]], native.encode(copies), atol=1e-5)
    assert results[3].error.startswith("item 3: image file is truncated")


def test_a_model_that_is_none_is_refused_in_words(model, native, small):
    for wrong in (str(small), model[0]):
        with pytest.raises(TypeError, match=f"got a {type(wrong).__name__} as the model, want a SentenceTransformer"):
            encode_all(wrong, ["A dog."])
    with pytest.raises(ValueError, match="batch_tokens=7 for a model that is not loaded as an E5-V"):
        encode_all(native, ["A dog."], batch_tokens=7)
    with pytest.raises(TypeError, match="a single item"):
        encode_all(native, "A dog.")
