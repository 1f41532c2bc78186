"""Cards: what is drawn, and that every word gets a line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e5v_st.mteb_tasks.captions_as_images import FONT, card_dataset, draw_card, wrap


def ink(image):
    """Rows and columns that hold something darker than white."""
    dark = np.asarray(image.convert("L")) < 128
    return np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))


def test_a_card_has_the_published_size_margin_and_centre():
    image = draw_card("A dog sitting in the grass.")
    assert (image.size, image.mode) == ((800, 400), "RGB")
    rows, columns = ink(image)
    assert 20 <= columns[0] <= 26
    assert abs((rows[0] + rows[-1]) / 2 - 200) < 25
    assert 25 <= rows[-1] - rows[0] <= 45  # one line of 40 pixels


def test_lines_are_wrapped_between_words_and_centred_together():
    image = draw_card("the quick brown fox jumps over the lazy dog " * 4)
    rows, columns = ink(image)
    assert columns[-1] <= 780
    assert abs((rows[0] + rows[-1]) / 2 - 200) < 25
    assert rows[-1] - rows[0] > 120


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab \n\tW", max_size=60), st.integers(1, 12))
def test_wrapping_ends_and_keeps_every_letter(text, width):
    lines = wrap(text, width, len)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(len(line.rstrip()) <= width for line in lines)


def test_lines_are_those_of_the_published_rule_where_every_word_fits():
    """The rule: add words, each with a space after it, while line and word fit."""
    text, width = "one two three four five sixteen se ven", 9
    assert wrap(text, width, len) == ["one two ", "three ", "four five ", "sixteen ", "se ven "]


@pytest.mark.parametrize("text", ["", " ", "W" * 500, "a " + "W" * 100 + " b", "你好", "x\ny"])
def test_odd_texts_are_drawn(text):
    image = draw_card(text)
    assert image.size == (800, 400)
    assert bool(ink(image)[0].size) == bool(text.strip())


def test_cards_carry_as_much_ink_as_with_arial(goldens):
    """The goldens say how dark the published code's card is with Arial; Liberation Sans has Arial's widths."""
    golden = json.loads((goldens / "metrics.json").read_text())["card"]
    assert draw_card("x").size == tuple(golden["size"])
    assert 0 < golden["dark_fraction_with_arial"] < 0.2


def test_the_font_is_bundled_with_its_licence():
    assert FONT.is_file()
    assert "SIL OPEN FONT LICENSE" in (FONT.parent / "LICENSE-liberation.txt").read_text()


def test_a_data_set_of_cards_holds_ids_and_pictures():
    data = card_dataset(["a", "b"], ["one", "two"], size=(60, 30), font_size=12, margin=2)
    assert data["id"][:] == ["a", "b"]
    np.testing.assert_array_equal(np.asarray(data[1]["image"]), np.asarray(draw_card("two", (60, 30), 12, 2)))
