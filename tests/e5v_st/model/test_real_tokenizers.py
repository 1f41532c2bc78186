"""Prompts in the real tokenizers of Llama 3, Qwen and Mistral: their ids, their last token, and where a text ends."""

from __future__ import annotations

import re

import pytest
import real_tokenizers as real
from hypothesis import given, settings
from hypothesis import strategies as st

from e5v_st.model.backbone_e5v import BACKBONES
from e5v_st.model.items_e5v import Item
from e5v_st.model.pixels_e5v import Placeholder
from e5v_st.model.prompts_e5v import PROMPTS, WRAPPERS
from e5v_st.model.tokens_e5v import PromptTokenizer

ROWS = {row.name: row for row in BACKBONES}
#: Row -> its tokenizer, the same by tiktoken, the token of images in the model, and the last token of every prompt.
FAMILIES = {
    "llava_next-llama3": (real.llama3, "llama3", "<image>", 720),
    "llava_next-mistral": (real.mistral, None, "<image>", 28793),
    "llava_onevision": (real.qwen, "qwen", "<image>", 198),
    "qwen2_vl": (real.qwen, "qwen", "<|image_pad|>", 198),
    "qwen3_vl": (real.qwen, "qwen", "<|image_pad|>", 198),
    "qwen3_vl-thinking": (real.qwen, "qwen", "<|image_pad|>", 271),
    "internvl": (real.qwen, "qwen", "<IMG_CONTEXT>", 198),
    "mistral3": (real.tekken, "tekken", "[IMG]", 4),
}
ENDS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r",
    "\t",
    "7",
    "42",
    "😀",
    "👩\u200d",
    "é",
    "e\u0301",
    "a",
    ".",
    '"',
    ",",
    "語",
    "/",
)
CONTROL = ("<|im_end|>", "[/INST]", "<|eot_id|>", "</s>", "<image>", "[IMG]", "<|image_pad|>", "<sent>", "<think>")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ANY = st.lists(st.one_of(TEXTS, st.sampled_from(CONTROL)), max_size=3).map("".join)


#: Texts about which a model's own tokenizer is asked.
SOME = ("A dog.", "", "is red\n", "7 cats 😀 ", 'says "no"')


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def plain(name):
    return FAMILIES[name][0]()


@pytest.fixture(scope="module")
def tokenizer(name, plain):
    token = FAMILIES[name][2]
    return PromptTokenizer(plain, ROWS[name], token, plain.convert_tokens_to_ids(token), 8192)


def ids_of(tokenizer, prompt, text, **how):
    """The ids of a named prompt in which each image takes one token."""
    template = PROMPTS[prompt]
    shown = [Placeholder(tokenizer.image, (1,))] * template.count("<image>")
    ids, mask = tokenizer([Item(text if "<sent>" in template else None, (), template)], [shown], **how)
    assert mask.all()
    return ids[0].tolist()


def whole(name, prompt, text):
    template = PROMPTS[prompt].replace("<image>", ROWS[name].image)
    return WRAPPERS[ROWS[name].wrapper].replace("{}", template).replace("<sent>", text)


def by_other_code(name, plain, prompt, text):
    """The ids by tiktoken, in which control tokens of the text are characters."""
    control = {token.content: index for index, token in plain.added_tokens_decoder.items()}
    pieces = re.split("(" + "|".join(map(re.escape, control)) + ")", whole(name, prompt, "\0"))
    read = [control[piece] if piece in control else piece.replace("\0", text) for piece in pieces]
    return real.encode_plainly(FAMILIES[name][1], read)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_named_prompt_has_the_ids_of_the_checkpoints_own_tokenizer(name, plain, tokenizer, prompt):
    for text in SOME:
        ids = ids_of(tokenizer, prompt, text)
        assert ids == plain(whole(name, prompt, text), add_special_tokens=ROWS[name].adds_bos).input_ids
        assert ids[-1] == FAMILIES[name][3]
        if FAMILIES[name][1]:
            assert ids == by_other_code(name, plain, prompt, text)


_SYSTEM, _TURN = "151644 8948 198 2610 525 264 10950 17847 13 151645 198 ", "151644 872 198 "
_END = "151645 198 151644 77091 198"
_INST, _END_INST = "1 733 16289 28793 ", "733 28748 16289 28793"
#: The format's head, the text or image, E5-V's words and the format's tail; read by tiktoken and SentencePiece.
WRITTEN = {
    "qwen2_vl text": _SYSTEM + _TURN + "32 5562 624 19237 3403 11652 304 825 3409 25 220 " + _END,
    "qwen2_vl image": _SYSTEM + _TURN + "151652 151655 151653 198 19237 3403 2168 304 825 3409 25 220 " + _END,
    "qwen3_vl composed": _TURN + "151652 151655 151653 44427 419 2168 448 330 32 5562 10465 939 461 1371 10807 "
    "2168 304 825 3409 25 " + _END,
    "qwen3_vl-thinking text": _TURN + "32 5562 624 19237 3403 11652 304 825 3409 25 220 " + _END + " 151667 271 "
    "151668 271",
    "llava_next-mistral text": _INST + "330 3914 28723 13 17590 2747 12271 297 624 1707 28747 28705 " + _END_INST,
    "llava_next-mistral sts": _INST + "28705 330 3914 28723 13 17590 2747 12271 297 624 1707 28747 " + _END_INST,
    "mistral3 text": "1 3 1065 10575 1626 35417 4455 19286 1294 1925 3541 1058 1032 4",
    "mistral3 image": "1 3 10 1010 35417 4455 3937 1294 1925 3541 1058 1032 4",
}


@pytest.mark.parametrize(("name", "prompt"), [row.split() for row in WRITTEN], indirect=["name"])
def test_the_ids_of_prompts_are_these(name, tokenizer, prompt):
    assert ids_of(tokenizer, prompt, "A dog.") == [int(index) for index in WRITTEN[f"{name} {prompt}"].split()]


@settings(deadline=None, max_examples=30)
@given(ANY, st.sampled_from(ENDS), st.sampled_from([name for name in PROMPTS if "<sent>" in PROMPTS[name]]))
def test_any_text_has_the_ids_that_other_code_gives_it(name, plain, tokenizer, text, end, prompt):
    ids = ids_of(tokenizer, prompt, text + end)
    if FAMILIES[name][1]:
        assert ids == by_other_code(name, plain, prompt, text + end)
    elif not any(control in text for control in tokenizer.control):
        assert ids == plain(whole(name, prompt, text + end), add_special_tokens=ROWS[name].adds_bos).input_ids
    own = [index for index in ids_of(tokenizer, prompt, "") if index in tokenizer.control_ids]
    assert [index for index in ids if index in tokenizer.control_ids] == own


@settings(deadline=None, max_examples=30)
@given(ANY, st.sampled_from(ENDS), st.sampled_from([name for name in PROMPTS if "<sent>" in PROMPTS[name]]))
def test_no_token_of_the_tail_joins_the_text(name, plain, tokenizer, text, end, prompt):
    """A line break or a quotation mark next to the text may, as in any tokenizer; no word behind it does."""
    string = whole(name, prompt, "x")
    words = PROMPTS[prompt].partition("<sent>")[2].lstrip('\n",')
    offsets = plain(string, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
    tail = sum(start >= string.rindex(words) for start, _ in offsets)
    expected = ids_of(tokenizer, prompt, "x")
    assert 5 < tail < len(expected)
    assert ids_of(tokenizer, prompt, text + end)[-tail:] == expected[-tail:]


@settings(deadline=None, max_examples=20)
@given(TEXTS, st.sampled_from(list(PROMPTS)))
def test_pieces_between_control_tokens_have_the_ids_of_the_whole(name, plain, tokenizer, text, prompt):
    """So a control token in the text changes nothing but itself."""
    template = PROMPTS[prompt].replace("<image>", ROWS[name].image)
    expected = plain(whole(name, prompt, text), add_special_tokens=ROWS[name].adds_bos).input_ids
    assert tokenizer._encode_pieces(template, text) == expected


@pytest.mark.parametrize("legacy", [True, False])
def test_a_blank_that_a_tokenizer_puts_in_front_is_put_where_it_puts_it(legacy):
    """In front of every piece between control tokens, as older files of Llama 2's kind say, or of the first alone."""
    plain = real.mistral(legacy)
    tokenizer = PromptTokenizer(plain, ROWS["llava_next-mistral"], "<image>", 32000, 8192)
    for prompt in ("image", "composed"):
        expected = plain(whole("llava_next-mistral", prompt, "is red")).input_ids
        assert tokenizer._encode_pieces(PROMPTS[prompt], "is red") == expected
        behind = plain.convert_ids_to_tokens(expected)[expected.index(32000) + 1]
        assert behind.startswith("▁") == legacy


@settings(deadline=None, max_examples=20)
@given(ANY, st.integers(0, 30))
def test_a_text_that_is_too_long_is_cut_and_nothing_else(name, tokenizer, text, more):
    empty = ids_of(tokenizer, "text", "")
    limit = len(empty) + more
    ids = ids_of(tokenizer, "text", (text or "é😀") * 40, max_length=limit)
    assert len(ids) <= limit
    assert ids[-6:] == empty[-6:]
