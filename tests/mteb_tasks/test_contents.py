"""What is E5-V's own in an evaluation: prompts, edits of sentences and caption orders."""

from __future__ import annotations

import doctest

import mteb
import numpy as np
import pytest
from PIL import Image

from e5v_st.mteb_tasks import contents
from e5v_st.mteb_tasks.contents import Content, caption_orders, edit_sts_sentence, prompt_name


@pytest.mark.parametrize(
    ("sentence", "edited"),
    [
        ("A dog", "A dog."),
        ("A dog.", "A dog."),
        ("A dog!", "A dog!."),
        ("A dog?", "A dog."),
        ('He said "no"', "He said 'no'"),
        ("the dogs'", "the dogs'"),
        ('He asked "why?"', "He asked 'why?'"),
        ("two  spaces \t and a tab ", "two spaces and a tab."),
        ("", ""),
    ],
)
def test_sts_sentences_are_edited_as_published(sentence, edited):
    assert edit_sts_sentence(sentence) == edited


def test_fashioniq_captions_are_cleaned_and_joined_in_both_orders():
    assert caption_orders("is red.\n has stripes, \nis it? ") == [
        "is red, has stripes, is it",
        "is it, has stripes, is red",
    ]


@pytest.mark.parametrize(
    ("task", "subset", "role", "expected"),
    [
        ("E5VFashionIQRetrieval", "toptee", "query", "fashioniq-toptee-query"),
        ("E5VFashionIQRetrieval", "dress", "document", "fashioniq-dress-gallery"),
        ("E5VCIRRTest", "default", "query", "cirr-query"),
        ("E5VCIRRRetrieval", "default", "document", "cirr-gallery"),
        ("E5VSTS12", "default", None, "sts"),
        ("STS12", "default", None, "sts"),
        ("E5VCOCOT2IRetrieval", "default", "query", None),
        ("E5VCOCOI2IRetrieval", "t2i", "document", None),
    ],
)
def test_prompts_follow_task_and_category(task, subset, role, expected):
    assert prompt_name(mteb.get_task(task).metadata, subset, role) == expected


def test_keys_tell_contents_apart():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    several = [
        Content("a", None, "p"),
        Content("b", None, "p"),
        Content("a", None, "q"),
        Content("a", image, "p"),
        Content(None, image, "p"),
        Content(None, image.resize((40, 50)), "p"),
        Content(None, Image.frombytes("RGB", (40, 50), image.tobytes()), "p"),
    ]
    keys = [content.key(b"f") for content in several] + [several[0].key(b"g")]
    assert len(set(keys)) == len(keys)


def test_keys_tell_images_apart_whose_palettes_alone_differ():
    red, blue = (Image.new("RGB", (4, 4), colour).quantize(2) for colour in ("red", "blue"))
    assert red.tobytes() == blue.tobytes()
    assert Content(None, red, "p").key(b"f") != Content(None, blue, "p").key(b"f")


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(contents) == (0, 4)
