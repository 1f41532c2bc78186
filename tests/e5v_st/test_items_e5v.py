from __future__ import annotations

import io
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from e5v_st import items_e5v
from e5v_st.items_e5v import Item, open_image, read_item, read_items

NIGHTLY = 20_000 * (os.environ.get("E5V_NIGHTLY") == "1")


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
    "I;16L",
    "I;16B",
    "I;16N",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image = open_image(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


def test_alpha_is_dropped_as_in_the_published_code(picture):
    image = picture.convert("RGBA")
    image.putalpha(0)
    assert open_image(image).tobytes() == picture.tobytes()


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode, order):
    image = Image.frombytes(mode, (4, 1), np.array([0, 256, 32768, 65535], dtype=order).tobytes())
    assert [pixel[0] for pixel in np.asarray(open_image(image))[0]] == [0, 1, 128, 255]


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_only_on_request(monkeypatch, kind):
    stored = Image.new("RGB", (16, 8), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: to be turned by 90 degrees clockwise
    stored.paste("blue", (0, 0, 8, 8))
    data = io.BytesIO()
    stored.save(data, kind, exif=exif)
    image = open_image(data.getvalue())
    if kind != "TIFF":  # which Pillow itself turns as it loads it, for the published code too
        assert image.size == (16, 8)
        assert image.getpixel((2, 4))[2] > 200
        assert image.getpixel((13, 4))[0] > 200
    monkeypatch.setenv("E5V_EXIF", "1")
    image = open_image(data.getvalue())
    assert image.size == (8, 16)
    assert image.getpixel((4, 2))[2] > 200
    assert image.getpixel((4, 13))[0] > 200


def closed_image() -> Image.Image:
    data = io.BytesIO()
    Image.new("RGB", (2, 2)).save(data, "PNG")
    with Image.open(data) as image:
        return image


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_other_program_is_run_over_a_file(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was run"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    for source in (POSTSCRIPT, Image.open(io.BytesIO(POSTSCRIPT))):
        with pytest.raises(ValueError, match="a PostScript drawing"):
            open_image(source)


@pytest.mark.parametrize("text", ["http://[ is how an address begins", "http://a.b/c.png is a picture", "https://"])
def test_a_sentence_that_begins_like_an_address_is_a_sentence(text):
    assert read_item(text) == Item(text)


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


def serve_once(answer):
    """Starts a server that hands its one connection to ``answer``; returns its address."""
    import socket

    server = socket.create_server(("127.0.0.1", 0))

    def work():
        with server, server.accept()[0] as connection:
            connection.recv(2**16)
            answer(connection)

    threading.Thread(target=work, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/a.png"


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_a_server_that_sends_a_byte_now_and_then_times_out(monkeypatch, head):
    monkeypatch.setattr(items_e5v, "URL_TIMEOUT_SECONDS", 0.3)
    over = threading.Event()

    def drip(connection):
        connection.sendall(head)
        while not over.wait(0.05):  # far within the time limit of the socket
            connection.sendall(b"x")

    with pytest.raises(ValueError, match="timed out"):
        open_image(serve_once(drip))
    over.set()


@pytest.mark.parametrize("answer", [b"", b"no HTTP at all\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"])
def test_a_server_that_speaks_nonsense_gives_a_value_error(answer):
    with pytest.raises(ValueError, match="cannot read"):
        open_image(serve_once(lambda connection: connection.sendall(answer)))


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


def test_webp_and_jpeg_are_read(picture):
    for kind in ("WEBP", "JPEG", "BMP", "TIFF"):
        data = io.BytesIO()
        picture.save(data, kind)
        assert open_image(data.getvalue()).size == picture.size
