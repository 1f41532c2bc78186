"""``e5v app``: its handlers in Python, and the page in a headless Chromium where Gradio and Playwright are there."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import e5v_st
from e5v_st.cli import main
from e5v_st.index import app
from e5v_st.index.app import Searcher, render
from e5v_st.index.table_search import open_for_search

pytest.importorskip("lancedb")

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A table of six images and their folder."""
    root = tmp_path_factory.mktemp("app")
    (root / "images").mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (30 + 10 * number, 40), colour).save(root / "images" / f"{colour}.png")
    words = ["--model", "e5v-tiny", "--device", "cpu", "--thumbnails", "32"]
    assert main(["index", str(root / "images"), str(root / "colours.lance"), *words]) == 0
    (root / "broken.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def searcher(root):
    table, job = open_for_search(root / "colours.lance")
    return Searcher(table, job, e5v_st.load("e5v-tiny", device="cpu"))


def test_a_text_an_image_and_both_are_searched_as_encode_would(searcher, root):
    image = root / "images" / "red.png"
    gallery = searcher.model.encode([str(root / "images" / f"{colour}.png") for colour in COLOURS])
    for text, file, item in (
        ("a red square", None, {"text": "a red square"}),
        (" ", str(image), {"image": str(image)}),
        ("make it blue", str(image), {"image": str(image), "text": "make it blue"}),
    ):
        scores = gallery @ searcher.model.encode(item)
        answer = searcher.search(text, file)
        assert [row["id"] for row in answer.rows] == [f"{COLOURS[n]}.png" for n in np.argsort(-scores)]
        np.testing.assert_allclose([row["score"] for row in answer.rows], np.sort(scores)[::-1], atol=1e-5)


def test_the_note_has_the_words_of_the_first_row(searcher, root):
    answer = searcher.search("a red square", None)
    expected = e5v_st.words(searcher.model, [str(root / "images" / answer.rows[0]["id"])], k=5)[0]
    assert answer.note.endswith(f"the model's words for the first: {', '.join(expected)}")


def test_a_filter_and_more_like_this(searcher):
    assert [row["id"] for row in searcher.search("x", None, "width = 50").rows] == ["blue.png"]
    assert searcher.search("x", None, "width > 5000").note == "nothing was found, with this filter"
    found = searcher.more_like("blue.png")
    assert found.rows[0]["id"] == "blue.png"
    assert found.rows[0]["score"] == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_read_is_one_line_and_names_no_folder(searcher, root):
    for answer, message in (
        (searcher.search("", None), "type a text, drop an image, or both"),
        (searcher.search("", str(root / "broken.png")), "broken.png cannot be read as an image: "),
        (searcher.search("x", None, "nope > 1"), "the condition 'nope > 1' cannot be read"),
        (searcher.more_like("gone.png"), "the table has no row 'gone.png'"),
    ):
        assert answer.note.startswith(message)
        assert answer.rows == []
        assert "\n" not in answer.note
        assert str(root) not in answer.note


def test_a_very_long_text_is_searched(searcher):
    assert len(searcher.search("a dog " * 20_000, None).rows) == 6


def test_names_and_texts_of_rows_are_never_html():
    page = render([{"id": "<script>x</script>", "score": 0.5, "text": '"><img src=x onerror=y>'}])
    assert "<script>" not in page
    assert "<img" not in page


# ---- in a browser ----


@pytest.fixture(scope="module")
def page_address(searcher):
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    pytest.importorskip("gradio")
    page = app.make_page(searcher, "colours.lance")
    yield app.start(page, port=0, block=False)
    page.close()


@pytest.fixture
def browser_page():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})  # a phone's
        page.set_default_timeout(20_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        yield page
        browser.close()


def note(page):
    return page.locator("#note textarea").input_value()


def search(page, text=None, image=None):
    """Fills the form, searches, and waits for another note."""
    if text is not None:
        page.locator("#text textarea").fill(text)
    if image is not None:
        page.locator("#image input[type=file]").set_input_files(image)
        page.locator("#image").get_by_text(image.stem).first.wait_for()
    before = note(page)
    page.locator("#go").click()
    page.wait_for_function("before => document.querySelector('#note textarea').value !== before", arg=before)
    return note(page)


def names(page):
    return [text.split("\n")[-1] for text in page.locator("#results figcaption").all_inner_texts()]


def test_in_a_browser_queries_are_answered_and_nothing_but_this_machine_is_asked(
    page_address, browser_page, searcher, root
):
    page = browser_page
    page.goto(page_address)
    page.locator("#go").wait_for()
    assert "6 of 6 rows" in search(page, text="a red square")
    assert names(page) == [row["id"] for row in searcher.search("a red square", None).rows]
    images = page.locator("#results img")
    assert images.count() == 6
    assert all(images.nth(n).get_attribute("src").startswith("data:image/jpeg") for n in range(6))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # fits on a phone

    both = searcher.search("make it blue", str(root / "images" / "red.png"))
    assert "the image as the text says" in search(page, text="make it blue", image=root / "images" / "red.png")
    assert names(page) == [row["id"] for row in both.rows]

    search(page, text="")
    assert names(page)[0] == "red.png"  # the image alone
    page.locator("#like label").nth(1).click()
    page.wait_for_function("document.querySelector('#note textarea').value.includes('more like')")
    if path := os.environ.get("E5V_SCREENSHOT"):
        page.screenshot(path=path, full_page=True)
    strangers = [url for url in page.asked if not url.startswith((page_address, "data:", "blob:"))]
    assert strangers == []


def test_in_a_browser_an_unreadable_image_and_a_long_text_are_a_line_and_keys_are_enough(
    page_address, browser_page, root
):
    page = browser_page
    page.goto(page_address)
    page.locator("#go").wait_for()
    assert search(page, image=root / "broken.png").startswith("broken.png cannot be read as an image")
    page.reload()
    page.locator("#go").wait_for()
    assert "6 of 6 rows" in search(page, text="a dog " * 5000)
    page.reload()
    page.locator("#go").wait_for()
    page.locator("#text textarea").focus()
    page.keyboard.type("blue")
    for _ in range(12):  # to the button, past what is between
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "go":
            break
    page.keyboard.press("Enter")
    page.locator("#results figcaption").first.wait_for()


def test_no_file_of_this_machine_is_served(page_address, root):
    for path in ("/etc/passwd", root / "images" / "red.png", root / "colours.lance"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{page_address}gradio_api/file={path}")
        assert refusal.value.code in (403, 404)
    query = {"data": ["", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "", "vector"]}
    request = urllib.request.Request(
        f"{page_address}gradio_api/call/search", json.dumps(query).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as begun:
        event = json.load(begun)["event_id"]
    with urllib.request.urlopen(f"{page_address}gradio_api/call/search/{event}") as answer:
        text = answer.read().decode()
    assert "event: error" in text
    assert "root:" not in text
