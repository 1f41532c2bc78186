from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from e5v_st.model.prompts_e5v import PROMPTS, WRAPPERS, chat_template, render, resolve_prompt


def test_the_published_text_prompt_to_the_letter():
    assert render(PROMPTS["text"], "llama3", "A dog.") == (
        "<|start_header_id|>user<|end_header_id|>\n\nA dog.\nSummary above sentence in one word: "
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
    )


def test_the_published_composed_prompt_keeps_its_misspelling():
    assert 'Modify this image with "make it snow", desribe modified image in one word:' in render(
        PROMPTS["composed"], "mistral", "make it snow"
    )


def test_toptee_is_prompted_as_shirt():
    assert PROMPTS["fashioniq-toptee-query"] == PROMPTS["fashioniq-shirt-query"]
    assert "dress" in PROMPTS["fashioniq-dress-query"]


def test_an_unknown_wrapper_is_refused():
    with pytest.raises(ValueError, match="llama3, mistral"):
        render(PROMPTS["text"], "gpt", "x")


@pytest.mark.parametrize(
    ("prompt", "has_sentence", "images", "expected"),
    [
        (None, True, 0, PROMPTS["text"]),
        ("", True, 0, PROMPTS["text"]),
        (None, False, 1, PROMPTS["image"]),
        (None, True, 1, PROMPTS["composed"]),
        (None, False, 2, "<image><image>\nSummary above image in one word: "),
        ("say: <sent>", True, 0, "say: <sent>"),
        ("<image> and <image>", False, 2, "<image> and <image>"),
        ("query: ", True, 0, "query: " + PROMPTS["text"]),
        ("look: ", False, 1, "look: " + PROMPTS["image"]),
    ],
)
def test_a_prompt_is_resolved_by_what_the_item_holds(prompt, has_sentence, images, expected):
    assert resolve_prompt(prompt, has_sentence, images) == expected


@pytest.mark.parametrize(
    ("prompt", "has_sentence", "images", "message"),
    [
        ("<sent>", False, 1, "room for 0 image"),
        ("<image>", True, 1, "has a text"),
        ("<image><sent>", True, 0, "room for 1 image"),
        ("<sent>", False, 0, "has no text"),
        ("<image><image>", False, 3, "room for 2 image"),
    ],
)
def test_a_prompt_that_would_drop_or_miss_something_is_refused(prompt, has_sentence, images, message):
    with pytest.raises(ValueError, match=message):
        resolve_prompt(prompt, has_sentence, images)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prompt", [None, "query: ", *PROMPTS.values()])
@pytest.mark.parametrize(("sentence", "images"), [('it\'s "so"\\n', 0), (None, 1), ("red", 1), (None, 2), ("red", 2)])
def test_the_chat_template_renders_the_same_string(wrapper, prompt, sentence, images):
    content = [{"type": "image"}] * images + ([] if sentence is None else [{"type": "text", "text": sentence}])
    messages = [{"role": "system", "content": prompt}] if prompt else []
    messages.append({"role": "user", "content": content})
    try:
        expected = render(resolve_prompt(prompt, sentence is not None, images), wrapper, sentence or "")
    except ValueError:
        return
    rendered, _ = render_jinja_template([messages], chat_template=chat_template(wrapper))
    assert rendered == [expected]


def test_the_chat_template_takes_plain_string_contents():
    messages = [{"role": "user", "content": "A dog."}]
    rendered, _ = render_jinja_template([messages], chat_template=chat_template("llama3"))
    assert rendered == [render(PROMPTS["text"], "llama3", "A dog.")]


@pytest.mark.parametrize("name", PROMPTS)
def test_the_name_of_a_prompt_is_not_taken_for_an_instruction(name):
    with pytest.raises(ValueError, match=f"use prompt_name='{name}'"):
        resolve_prompt(name, has_sentence=True, num_images=0)
