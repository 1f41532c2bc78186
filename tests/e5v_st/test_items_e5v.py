from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from e5v_st import items_e5v
from e5v_st.items_e5v import Item, open_image, read_item, read_items


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3))


@pytest.fixture
def file(tmp_path, picture):
    picture.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def same(item: Item, picture: Image.Image) -> bool:
    return [image.tobytes() for image in item.images] == [picture.tobytes()]


def test_every_form_of_an_image_is_the_same_image(picture, file):
    array = np.asarray(picture)
    forms = [picture, file, str(file), file.read_bytes(), {"bytes": file.read_bytes(), "path": None}, array]
    forms += [array.transpose(2, 0, 1), {"bytes": None, "path": str(file)}]
    for form in forms:
        assert same(read_item({"image": form}), picture)
    for form in [picture, file, str(file), array, {"image": [picture]}]:
        assert same(read_item(form), picture)


def test_a_text_in_a_dictionary_is_never_a_path(file):
    assert read_item({"text": str(file)}) == Item(str(file))
    assert read_item("no such file.png") == Item("no such file.png")


def test_messages_are_read_as_items(picture):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "red"}]
    item = read_item([{"role": "system", "content": "<image><sent>"}, {"role": "user", "content": content}])
    assert (item.sentence, item.prompt) == ("red", "<image><sent>")
    assert same(item, picture)
    assert read_item({"role": "user", "content": "hello"}) == Item("hello")


MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "F",
    "La",
    "RGBa",
    "I;16",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image = open_image(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


def test_alpha_is_dropped_as_in_the_published_code(picture):
    image = picture.convert("RGBA")
    image.putalpha(0)
    assert open_image(image).tobytes() == picture.tobytes()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    assert [pixel[0] for pixel in np.asarray(open_image(image))[0]] == [0, 1, 128, 255]


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


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
        ({"image": np.zeros((2, 0, 3), np.uint8)}, "shape"),
        ({"image": np.zeros((2, 2, 7), np.uint8)}, "shape"),
        ({"image": object()}, "cannot read a object"),
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


def test_truncated_files_are_refused(file):
    for end in (1, 20, len(file.read_bytes()) - 30):
        with pytest.raises(ValueError, match="cannot read"):
            open_image(file.read_bytes()[:end])


def test_a_bomb_is_refused_by_pillows_own_limit(monkeypatch, picture, file):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(ValueError, match="exceeds limit"):
        open_image(file)


class Pages(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2] or self.path)
            self.end_headers()
            return
        found = self.path in self.server.files
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.server.files.get(self.path, b""))

    def log_message(self, *args):
        pass


@pytest.fixture
def web(file):
    server = HTTPServer(("127.0.0.1", 0), Pages)
    server.files = {"/picture.png": file.read_bytes()}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_image_url_is_fetched(web, picture):
    assert same(read_item(f"{web}/picture.png"), picture)
    assert same(read_item({"image": f"{web}/redirect?/picture.png"}), picture)


def test_urls_have_limits(web, monkeypatch, tmp_path):
    for address, message in [("/a.png", "404"), ("/redirect?file:///etc/passwd", "'file:"), ("/redirect", "loop")]:
        with pytest.raises(ValueError, match=message):
            open_image(web + address)
    monkeypatch.setattr(items_e5v, "URL_MAX_BYTES", 10)
    with pytest.raises(ValueError, match="larger than"):
        open_image(f"{web}/picture.png")
    monkeypatch.setenv("E5V_URLS", "0")
    with pytest.raises(ValueError, match="switched off"):
        open_image(f"{web}/picture.png")


def test_a_server_that_never_answers_times_out(monkeypatch):
    import socket

    monkeypatch.setattr(items_e5v, "URL_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="timed out"):
        open_image(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")


def test_webp_and_jpeg_are_read(picture):
    for kind in ("WEBP", "JPEG", "BMP", "TIFF"):
        data = io.BytesIO()
        picture.save(data, kind)
        assert open_image(data.getvalue()).size == picture.size
