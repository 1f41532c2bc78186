from __future__ import annotations

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from e5v_st.model.items_e5v import Item, read_item, read_items

NIGHTLY = 20_000 * (os.environ.get("E5V_NIGHTLY") == "1")


def test_messages_are_read_as_items():
    picture = Image.new("RGB", (5, 4), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "red"}]
    item = read_item([{"role": "system", "content": "<image><sent>"}, {"role": "user", "content": content}])
    assert (item.sentence, item.prompt) == ("red", "<image><sent>")
    assert [image.tobytes() for image in item.images] == [picture.tobytes()]
    assert read_item({"role": "user", "content": "hello"}) == Item("hello")


def closed_image() -> Image.Image:
    data = io.BytesIO()
    Image.new("RGB", (2, 2)).save(data, "PNG")
    with Image.open(data) as image:
        return image


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "got None"),
        (3, "cannot read a int"),
        (["a", "b"], "got a list of 2"),
        (("a", "b"), "got a tuple of 2"),
        ([], "got a list of 0"),
        ({}, "keys"),
        ({"txt": "a"}, r"keys \['txt'\]"),
        ({"text": None}, "neither a text nor an image"),
        ({"text": 3}, "text of type int"),
        ({"image": "missing.png"}, "no such file"),
        ({"image": "ftp://host/a.png"}, "only http"),
        ({"image": b"not an image"}, "cannot identify"),
        ({"image": b""}, "cannot identify"),
        ({"image": "drawing.svg"}, "vector drawing"),
        ({"image": "photo.heic"}, "convert it"),
        ({"image": np.zeros((2, 2, 3))}, "float64"),
        ({"image": np.zeros((2, 2, 3), np.uint16)}, "uint16"),
        ({"image": np.zeros((2, 2, 3), bool)}, "bool"),
        ({"image": np.zeros((2, 2, 3), np.int8)}, "int8"),
        ({"image": np.zeros((2, 0, 3), np.uint8)}, "shape"),
        ({"image": np.zeros((2, 2, 7), np.uint8)}, "shape"),
        ({"image": object()}, "cannot read a object"),
        ({"image": np.full((2, 2, 3), np.nan, np.float32)}, "float32"),
        ({"image": np.float64("nan")}, "want"),
        ({"image": closed_image()}, "cannot read a PngImageFile"),
        ({"image": {"bytes": None, "path": None}}, "want"),
        ({"image": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "cannot identify"),
        ({"image": b"\0\0\0\x18ftypheic" + bytes(99)}, "cannot identify"),
        ({"image": "a\0b.png"}, "no such file"),
        ({"image": "http://127.0.0.1:1/a b.png"}, "control characters"),
        ({"image": "http://[/a.png"}, "IPv6"),
        (float("nan"), "a float"),
        (b"text", "cannot identify"),
        ((part for part in "ab"), "a generator"),
        ({"text": b"a"}, "type bytes"),
        ([{"role": "user", "content": 5}], "content is a int"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "content is a dict"),
        ([{"role": "user", "content": [{"type": "text"}]}], "type NoneType"),
        ("lone \ud800 surrogate", "lone surrogate at position 5"),
        ([{"role": "assistant", "content": "x"}], "role 'assistant'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "'video'"),
        ([{"role": "user", "content": []}], "neither"),
    ],
)
def test_what_is_no_item_is_refused_with_its_index(value, message):
    with pytest.raises(ValueError, match=message) as error:
        read_items(["fine", value])
    assert str(error.value).startswith("item 1: ")


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.binary(max_size=9),
        st.text(st.characters(), max_size=9),
        st.sampled_from(
            ["text", "image", "role", "user", "content", "type", "bytes", "path", "http://[a.png", "a.svg"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["text", "image", "role", "content", "bytes", "path", 3]), inner, max_size=3),
        st.builds(lambda content: {"role": "user", "content": content}, inner),
        st.builds(lambda kind, part: {"type": kind, kind: part}, st.sampled_from(["text", "image"]), inner),
    ),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=NIGHTLY or 400, deadline=None)
@given(st.lists(anything, max_size=4))
def test_anything_at_all_is_an_item_or_a_value_error_at_its_index(values):
    def sound(value):
        try:
            return read_items([value])[0]
        except ValueError:
            return None

    alone = [sound(value) for value in values]
    if None not in alone:
        assert read_items(values) == alone
        return
    with pytest.raises(ValueError, match=rf"^item {alone.index(None)}: "):
        read_items(values)
