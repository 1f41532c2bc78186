from __future__ import annotations

import base64
import io
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from e5v_st.model import images_e5v
from e5v_st.model.images_e5v import open_image
from e5v_st.model.items_e5v import Item, decoded_bytes, read_item, read_items


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3))


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
    forms += [
        io.BytesIO(file.read_bytes()),
        bytearray(file.read_bytes()),
        memoryview(file.read_bytes()),
        data_url(file),
    ]
    with file.open("rb") as opened:
        for form in [*forms, opened]:
            assert same(read_item({"image": form}), picture)
            assert same(read_item({"image": [form]}), picture)
            assert same(read_item({"role": "user", "content": [{"type": "image", "image": form}]}), picture)
            assert same(read_item(form), picture)


def data_url(file, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def test_a_file_object_is_read_from_its_beginning_and_left_as_it_was(picture, file):
    data = io.BytesIO()
    picture.save(data, "PNG")  # which ends at the end
    with file.open("rb") as opened:
        opened.seek(7)
        for source, position in ((data, data.tell()), (opened, 7)):
            for _ in range(2):
                assert same(read_item({"image": source}), picture)
                assert source.tell() == position
    with pytest.raises(ValueError, match=r"cannot read a BufferedReader as an image: .*closed file"):
        open_image(opened)
    with file.open() as text, pytest.raises(ValueError, match="cannot read a TextIOWrapper"):
        open_image(text)
    with pytest.raises(ValueError, match="reading it gives a str, want bytes"):
        open_image(io.StringIO("text"))


def test_a_stream_that_cannot_go_back_is_read_once(picture, file):
    reader, writer = os.pipe()
    os.write(writer, file.read_bytes())
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert decoded_bytes({"image": stream}) > 0  # without taking anything from it
        assert same(read_item({"image": stream}), picture)


def test_one_file_object_may_be_read_by_many_threads(picture, file):
    with file.open("rb") as opened, ThreadPoolExecutor(8) as threads:
        assert all(same(item, picture) for item in threads.map(read_item, [opened] * 200))


def test_a_text_in_a_dictionary_is_never_a_path(file):
    assert read_item({"text": str(file)}) == Item(str(file))
    assert read_item({"text": data_url(file)}) == Item(data_url(file))
    assert read_item("no such file.png") == Item("no such file.png")


def test_a_bare_string_is_always_a_text_on_request(file):
    for text in (str(file), "http://127.0.0.1:1/a.png", data_url(file), "data:image/png;base64,broken"):
        assert read_items([text], strings="text")[0].sentence == text
    assert read_items([{"image": str(file)}], strings="text")[0].images  # which says what it is
    with pytest.raises(ValueError, match="got strings='texts', want one of 'auto', 'text'"):
        read_items(["a"], strings="texts")


@pytest.mark.parametrize("suffix", ["avif", "jfif", "jp2", "ppm", "tga", "mpo", "JPG"])
def test_a_string_that_names_a_file_of_any_kind_that_pillow_reads_is_that_image(tmp_path, suffix):
    image = Image.new("RGB", (16, 16), "red")
    image.save(tmp_path / f"a.{suffix}")
    assert read_item(str(tmp_path / f"a.{suffix}")).images[0].tobytes() == image_of(tmp_path / f"a.{suffix}").tobytes()


def image_of(path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_a_plugin_that_reads_heic_is_used(tmp_path, monkeypatch, picture):
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.heic")  # stands for what a plugin reads
    with pytest.raises(ValueError, match="HEIC: convert it"):
        read_item(str(tmp_path / "a.heic"))
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")
    assert same(read_item(str(tmp_path / "a.heic")), picture)


# ---- data: addresses ----


def test_a_data_address_is_the_image_that_it_holds(picture, file):
    address = data_url(file)
    head, payload = address.split(",")
    wrapped = "\n".join(payload[i : i + 76] for i in range(0, len(payload), 76))
    forms = [
        address,
        address.upper()[: len(head)] + "," + payload,
        f"{head},{wrapped}\n",
        f"{head},{payload.rstrip('=')}",
    ]
    forms += [f"{head},{quote(payload, safe='')}", f"data:image/png;name=a.png;base64,{payload}"]
    for form in forms:
        assert same(read_item(form), picture)
        assert decoded_bytes(form) == 4 * 5 * 6
    assert same(read_item({"image": data_url(file, "application/octet-stream")}), picture)
    assert same(read_item({"role": "user", "content": [{"type": "image", "url": address}]}), picture)
    assert same(read_item({"image": {"bytes": None, "path": address}}), picture)


@pytest.mark.parametrize("address", ["file:///tmp/d.png", "s3://b/d.png", "GS://b/d.JPG", "hf+x://b/d.webp?version=1"])
def test_an_address_of_an_image_that_is_not_fetched_is_refused(address):
    for value in (address, {"image": address}):
        with pytest.raises(ValueError, match="only http:// and https:// addresses are fetched: give a path"):
            read_item(value)
    assert read_item({"text": address}) == read_item(address, strings="text") == Item(address)
    for text in (f"see {address}", f"{address} is gone", "s3://b/d.parquet", "://d.png", "a/b://d.png"):
        assert read_item(text) == Item(text)


@pytest.mark.parametrize("shape", [(3, 7, 4), (4, 7, 3), (1, 5, 1), (3, 3, 3), (1, 1, 3)])
def test_an_array_whose_channels_may_be_first_or_last_is_refused(shape):
    array = np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match=r"which may be \(H, W, C\) or \(C, H, W\): give it as a PIL image"):
        open_image(array)
    with pytest.raises(ValueError, match="item 1: "):
        read_items(["A dog.", {"image": array}])


@pytest.mark.parametrize(
    "text", ["data:image/png is how one begins", "data: image/png;base64,", "data:text/plain,hello"]
)
def test_a_text_about_data_addresses_is_a_text(text):
    assert read_item(text) == Item(text)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("data:image/png;base64", "cannot identify"),
        ("data:image/png;base64,", "cannot identify"),
        ("data:image/png,PAYLOAD", "want an image in base64"),
        ("data:image/png;base64,PAYLOAD PAYLOAD", "its base64 is broken"),
        ("data:image/png;base64,PAYLOAD\u00e9", "its base64 is broken"),
        ("data:image/png;base64,PAYLO", "its base64 is broken"),
        ("data:image/png;base64,PAYLOAD_-", "its base64 is broken"),
        ("data:image/svg+xml;base64,PAYLOAD", "a vector drawing"),
        ("data:image/svg+xml,<svg>PAYLOAD</svg>", "a vector drawing"),
        ("data:image/heic;base64,PAYLOAD", "HEIC"),
        ("data:image/png;base64," + "PAYLOAD1" * 1000, "cannot identify"),
    ],
)
def test_a_broken_data_address_is_refused_without_its_payload(address, message):
    for item in (address, {"image": address}, {"role": "user", "content": [{"type": "image", "url": address}]}):
        with pytest.raises(ValueError, match=message) as error:
            read_items(["a", item])
        assert str(error.value).startswith("item 1: cannot read 'data:image/")
        assert "PAYLO" not in str(error.value)
        assert len(str(error.value)) < 200


def test_a_truncated_image_in_a_data_address_is_refused(file):
    address = data_url(file)
    with pytest.raises(ValueError, match="cannot read 'data:image/png;base64,…"):
        read_item(address[: len(address) // 2 // 4 * 4])


def test_data_addresses_have_limits(monkeypatch, file):
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
        with pytest.raises(ValueError, match="exceeds limit"):
            read_item(data_url(file))
    monkeypatch.setattr(images_e5v, "URL_MAX_BYTES", 10)
    with pytest.raises(ValueError, match="larger than"):
        read_item(data_url(file))


@pytest.mark.parametrize("image", ["A" * 10_000, "http://127.0.0.1:1/" + "a b" * 9999, "/" + "a/" * 9999 + "b.png"])
def test_an_error_repeats_no_long_string(image):
    with pytest.raises(ValueError, match="cannot read") as error:
        read_item({"image": image})
    assert len(str(error.value)) < 800


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


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode, order):
    image = Image.frombytes(mode, (4, 1), np.array([0, 256, 32768, 65535], dtype=order).tobytes())
    assert [pixel[0] for pixel in np.asarray(open_image(image))[0]] == [0, 1, 128, 255]


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
IN_EIGHT_BITS = Image.fromarray(GREY).convert("RGB")


def tiff(values: np.ndarray, bits: int, sample_format: int, photometric: int = 1) -> bytes:
    """A TIFF of one band, written by hand: Pillow does not write every kind that it reads."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    data, (height, width) = values.tobytes(), (16, 16)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags]
    end = 8 + len(data)
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}I", end)
    return head + data + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)


def in_twelve_bits(values: np.ndarray) -> np.ndarray:
    pairs = values.astype(np.uint32).reshape(-1, 2)
    whole = (pairs[:, 0] << 12) | pairs[:, 1]
    return np.stack([whole >> 16, (whole >> 8) & 255, whole & 255], 1).astype(np.uint8)


def pgm(maximum: int, plain: bool) -> bytes:
    values = np.rint(GREY / 255 * maximum).astype(int)
    if plain:
        return f"P2 16 16 {maximum}\n{' '.join(map(str, values.flat))}\n".encode()
    return f"P5 16 16 {maximum}\n".encode() + values.astype(">u2" if maximum > 255 else "u1").tobytes()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


SIXTEEN, INTEGERS = GREY.astype(np.uint16) * 257, GREY.astype(np.int32) * 257
UNIT = (GREY / 255).astype(np.float32)

DEEP = {
    "16-bit PGM": pgm(65535, plain=False),
    "plain 16-bit PGM": pgm(65535, plain=True),
    "10-bit PGM": pgm(1023, plain=False),
    "plain 12-bit PGM": pgm(4095, plain=True),
    "PGM by Pillow": saved(Image.fromarray(INTEGERS), "PPM"),
    "16-bit PNG": saved(Image.fromarray(SIXTEEN), "PNG"),
    "16-bit JPEG 2000": saved(Image.fromarray(SIXTEEN), "JPEG2000"),
    "16-bit TIFF": tiff(SIXTEEN, 16, 1),
    "16-bit TIFF, big endian": tiff(SIXTEEN.astype(">u2"), 16, 1),
    "16-bit TIFF, compressed": saved(Image.fromarray(SIXTEEN), "TIFF", compression="tiff_lzw"),
    "12-bit TIFF": tiff(in_twelve_bits(GREY.astype(int) * 4095 // 255), 12, 1),
    "32-bit TIFF of a 16-bit image by Pillow": saved(Image.fromarray(INTEGERS), "TIFF"),
    "float TIFF": tiff(UNIT, 32, 3),
    "float TIFF by Pillow": saved(Image.fromarray(UNIT), "TIFF", compression="tiff_lzw"),
    "float TIFF of 8-bit values": tiff(GREY.astype(np.float32), 32, 3),
    "PFM": saved(Image.fromarray(UNIT), "PPM"),
    "mode I": Image.fromarray(INTEGERS),
    "mode F from 0 to 1": Image.fromarray(UNIT),
    "mode F of 8-bit values": IN_EIGHT_BITS.convert("L").convert("F"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_pixels_are_those_of_the_same_image_in_eight_bits(kind):
    np.testing.assert_array_equal(np.asarray(open_image(DEEP[kind])), np.asarray(IN_EIGHT_BITS))


@pytest.mark.parametrize(("values", "bits", "sample_format"), [(SIXTEEN, 16, 1), (UNIT, 32, 3)])
def test_a_deep_tiff_whose_white_is_zero_is_inverted_as_pillow_does_in_eight_bits(values, bits, sample_format):
    found = open_image(tiff(values, bits, sample_format, photometric=0))
    assert found.tobytes() == open_image(tiff(GREY, 8, 1, photometric=0)).tobytes()
    assert found.getpixel((0, 0)) == (255, 255, 255)


def test_the_high_bytes_of_deep_colours_are_taken(tmp_path):
    """Pillow itself does so; it writes no deep colours, so the file is written by hand."""
    colours = np.stack([GREY, GREY.T, 255 - GREY], 2).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    np.testing.assert_array_equal(np.asarray(open_image(data)), colours // 257)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (tiff(INTEGERS.astype("<i2"), 16, 2), "signed integers"),
        (tiff(GREY, 8, 2), "signed integers"),
        (tiff(GREY.astype(np.uint32) * 2**24, 32, 1), "mode is I, whose range is not known"),
        (tiff(GREY.astype(np.int32), 32, 2), "values go from 0 to 255: convert it to mode I;16"),
        (Image.fromarray(INTEGERS - 9), "values go from -9 to 65526"),
        (Image.fromarray(INTEGERS + 1), "values go from 1 to 65536"),
        (Image.fromarray(GREY.astype(np.int32)), "values go from 0 to 255"),
        (Image.fromarray(UNIT * 2), "floats from 0 to 2, whose range is not known"),
        (Image.fromarray(UNIT * 254.5), "floats from 0 to 254.5"),
        (Image.fromarray(UNIT - 0.5), "floats from -0.5 to 0.5"),
        (Image.fromarray(SIXTEEN.astype(np.float32)), "floats from 0 to 65535"),
        (Image.fromarray(np.where(GREY, UNIT, np.nan)), "not all of them are finite"),
        (Image.fromarray(np.where(GREY, UNIT, np.inf)), "not all of them are finite"),
        (tiff(np.full((16, 16), np.nan, np.float32), 32, 3), "not all of them are finite"),
    ],
)
def test_deep_pixels_whose_range_is_not_known_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        open_image(source)


@pytest.mark.parametrize(("bits", "message"), [(16, "measurements"), (-32, "measurements"), (8, "")])
def test_astronomical_measurements_are_refused(bits, message):
    cards = ["SIMPLE  =                    T", f"BITPIX  = {bits:20}", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                   16", "NAXIS2  =                   16", "END"]
    head = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    kinds = {8: GREY, 16: SIXTEEN.astype(">i2"), -32: UNIT.astype(">f4")}
    data = head + kinds[bits].tobytes().ljust(2880, b"\0")
    if not message:
        assert open_image(data).size == (16, 16)
        return
    with pytest.raises(ValueError, match=message):
        open_image(data)


def test_a_deep_image_is_turned_as_one_of_eight_bits_is(monkeypatch):
    monkeypatch.setenv("E5V_EXIF", "1")
    exif = Image.Exif()
    exif[0x0112] = 6
    deep, shallow = (saved(Image.fromarray(grey), "PNG", exif=exif) for grey in (SIXTEEN, GREY))
    assert open_image(deep).tobytes() == open_image(shallow).tobytes()


@pytest.mark.filterwarnings("ignore")  # Pillow wants palettes with transparency to become RGBA
def test_eight_bit_images_of_every_mode_are_what_pillow_makes_of_them():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    palette = Image.fromarray(noise).convert("RGB").quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    images = [
        Image.fromarray(noise),
        Image.fromarray(noise).convert("RGBa"),
        Image.fromarray(noise[..., :2], "LA"),
        palette,
    ]
    images += [Image.fromarray(noise[..., :3]).convert(mode) for mode in ("1", "L", "CMYK", "YCbCr", "HSV", "P")]
    for image in images:
        for source in (
            image,
            *(saved(image, kind) for kind in ("PNG", "TIFF") if image.mode in ("1", "L", "P", "RGBA")),
        ):
            expected = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
            assert open_image(source).tobytes() == expected.convert("RGB").tobytes()
    cmyk = saved(Image.fromarray(noise[..., :3]).convert("CMYK"), "JPEG", quality=95)  # inverted, as Adobe does
    assert open_image(cmyk).tobytes() == image_of(io.BytesIO(cmyk)).tobytes()
    near = np.asarray(open_image(cmyk)).astype(int) - np.asarray(Image.fromarray(noise[..., :3]))
    assert abs(near).mean() < 80  # not a negative


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


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_other_program_is_run_over_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was run"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    for source in (POSTSCRIPT, Image.open(io.BytesIO(POSTSCRIPT)), io.BytesIO(POSTSCRIPT)):
        with pytest.raises(ValueError, match="a PostScript drawing"):
            open_image(source)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    (tmp_path / "a.eps").write_bytes(POSTSCRIPT)
    address = "data:image/png;base64," + base64.b64encode(POSTSCRIPT).decode()
    for source in (str(tmp_path / "a.png"), str(tmp_path / "a.eps"), address):
        with pytest.raises(ValueError, match="a PostScript drawing"):
            read_item(source)
        decoded_bytes(source)
    with pytest.raises(ValueError, match="an IPTC record around another file"):
        open_image(iptc_around(POSTSCRIPT))


def iptc_around(content: bytes) -> bytes:
    """An IPTC record whose image is another file, which Pillow opens as whatever it is."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, record, number]) + struct.pack(">H", len(data)) + data

    fields = [(3, 60, b"\1\0"), (3, 20, b"\0\x09"), (3, 30, b"\0\x09"), (3, 120, b"\5"), (8, 10, content)]
    return b"".join(field(*each) for each in fields)


@pytest.mark.parametrize("text", ["http://[ is how an address begins", "http://a.b/c.png is a picture", "https://"])
def test_a_sentence_that_begins_like_an_address_is_a_sentence(text):
    assert read_item(text) == Item(text)


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
    monkeypatch.setattr(images_e5v, "URL_MAX_BYTES", 10)
    with pytest.raises(ValueError, match="larger than"):
        open_image(f"{web}/picture.png")
    monkeypatch.setenv("E5V_URLS", "0")
    with pytest.raises(ValueError, match="switched off"):
        open_image(f"{web}/picture.png")


def test_a_server_that_never_answers_times_out(monkeypatch):
    import socket

    monkeypatch.setattr(images_e5v, "URL_TIMEOUT_SECONDS", 0.2)
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
    monkeypatch.setattr(images_e5v, "URL_TIMEOUT_SECONDS", 0.3)
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


def test_webp_and_jpeg_are_read(picture):
    for kind in ("WEBP", "JPEG", "BMP", "TIFF"):
        data = io.BytesIO()
        picture.save(data, kind)
        assert open_image(data.getvalue()).size == picture.size


@pytest.mark.parametrize(("words", "on"), [("1 true YES on", True), ("0 False no OFF", False)])
def test_switches_are_read_in_every_usual_form(monkeypatch, words, on):
    for word in words.split():
        monkeypatch.setenv("E5V_URLS", word)
        monkeypatch.setenv("E5V_EXIF", word)
        assert images_e5v.is_on("E5V_URLS", usual=True) is images_e5v.is_on("E5V_EXIF", usual=False) is on


@pytest.mark.parametrize("word", ["fasle", "2", "none"])
def test_a_switch_that_says_something_else_is_refused(monkeypatch, tmp_path, word):
    monkeypatch.setenv("E5V_URLS", word)
    with pytest.raises(ValueError, match=f"got E5V_URLS='{word}' in the environment, want 1 or 0"):
        open_image("http://127.0.0.1:9/dog.png")
