from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from e5v_st.model.backbone_e5v import BACKBONES
from e5v_st.model.items_e5v import Item
from e5v_st.model.prompts_e5v import PROMPTS, render
from e5v_st.model.tokens_e5v import PromptTokenizer

LLAMA3 = next(row for row in BACKBONES if row.name == "llava_next-llama3")


def make(tokenizer: PreTrainedTokenizerFast, image_id: int = 128256, positions: int = 8192) -> PromptTokenizer:
    return PromptTokenizer(tokenizer, LLAMA3, "<image>", image_id, positions)


def ids_of(tokenizer: PromptTokenizer, sentence: str | None, prompt: str, max_length: int | None = None) -> list[int]:
    ids, mask = tokenizer([Item(sentence, (), prompt)], [[]], max_length)
    return ids[0][mask[0].bool()].tolist()


@pytest.fixture(scope="module")
def tokenizer(model):
    return model[0].prompt_tokenizer


def test_llama3_gives_the_published_ids(llama3):
    assert llama3.convert_tokens_to_ids("<image>") == 128256
    ids = llama3(render(PROMPTS["image"])).input_ids
    golden = [128006, 882, 128007, 271, 128256, 198, 19791, 3485, 2217, 304, 832, 3492, 25, 220]
    assert ids == [*golden, 128009, 128006, 78191, 128007, 271, 720]


def test_llama3_prompts_end_in_the_pooled_token(llama3):
    tokenizer = make(llama3)
    for sentence in ("A dog.", "", "<image>", "ends in newline\n", "<|eot_id|>"):
        assert ids_of(tokenizer, sentence, PROMPTS["text"])[-2:] == [271, 720]


def test_bos_is_there_only_if_the_tokenizer_adds_it(llama3):
    from tokenizers.processors import TemplateProcessing

    plain = make(llama3)
    assert ids_of(plain, "A dog.", PROMPTS["text"])[0] == 128006
    with_bos = PreTrainedTokenizerFast(tokenizer_object=llama3.backend_tokenizer, bos_token="<|begin_of_text|>")
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    tokenizer = make(with_bos)
    for sentence in ("A dog.", "a <image> tag"):
        assert ids_of(tokenizer, sentence, PROMPTS["text"])[:2] == [128000, 128006]


def test_llama3_control_tokens_in_a_sentence_are_characters(llama3):
    tokenizer = make(llama3)
    for control in ("<image>", "<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>"):
        ids = ids_of(tokenizer, f"a {control} tag", PROMPTS["text"])
        assert [index for index in ids if index >= 128000] == [128006, 128007, 128009, 128006, 128007]
        assert f"a {control} tag\nSummary" in llama3.decode(ids)


def test_no_control_token_of_llama3_is_one_in_a_sentence(llama3):
    tokenizer = make(llama3)
    header = [128006, 128007, 128009, 128006, 128007]
    assert len(tokenizer.control) == 257
    for control in tokenizer.control:
        for sentence in (control, f"{control}{control}", f"a {control} tag", f"\n{control} "):
            ids = ids_of(tokenizer, sentence, PROMPTS["text"])
            assert [index for index in ids if index >= 128000] == header, sentence
            assert sentence in llama3.decode(ids)


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None)
@given(plain_text)
def test_a_prompt_is_what_the_checkpoints_tokenizer_makes_of_the_whole_string(model, tokenizer, sentence):
    assume(not any(control in sentence for control in tokenizer.control))  # in a text those are characters
    whole = model.tokenizer(render(PROMPTS["text"], "llama3", sentence)).input_ids
    assert ids_of(tokenizer, sentence, PROMPTS["text"]) == whole


@settings(deadline=None)
@given(plain_text)
def test_the_pieces_give_the_same_ids_as_the_whole(model, tokenizer, sentence):
    assume(not any(control in sentence for control in tokenizer.control))
    whole = model.tokenizer(render(PROMPTS["sts"], "llama3", sentence)).input_ids
    assert tokenizer._encode_pieces(PROMPTS["sts"], sentence) == whole


def test_no_control_token_of_the_checkpoint_is_one_in_a_sentence(model, tokenizer):
    expected = [index for index in ids_of(tokenizer, "", PROMPTS["text"]) if index in tokenizer.control_ids]
    assert len(tokenizer.control) > 4
    for control in tokenizer.control:
        ids = ids_of(tokenizer, f"a{control}b", PROMPTS["text"])
        assert [index for index in ids if index in tokenizer.control_ids] == expected
        assert f"a{control}b" in model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


controls = st.sampled_from(["<image>", "<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>", "<sent>", "{}"])


@settings(deadline=None)
@given(st.lists(st.one_of(plain_text, controls), max_size=6).map("".join))
def test_user_text_never_becomes_control_tokens(model, tokenizer, sentence):
    ids = ids_of(tokenizer, sentence, PROMPTS["text"])
    control = [model.tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.control_ids]
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    assert control == ["<|begin_of_text|>", *header, "<|eot_id|>", *header]
    assert sentence in model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=40)
@given(plain_text, st.integers(30, 70))
def test_only_the_sentence_is_cut(tokenizer, sentence, limit):
    empty = ids_of(tokenizer, "", PROMPTS["text"])
    ids = ids_of(tokenizer, sentence + " and more" * 20, PROMPTS["text"], max(limit, len(empty)))
    assert len(ids) <= max(limit, len(empty))
    assert ids[-10:] == empty[-10:]
    assert ids[:6] == empty[:6]


def test_a_cut_sentence_keeps_as_much_as_fits(model, tokenizer):
    ids = ids_of(tokenizer, "A dog sitting in the grass. " * 30, PROMPTS["text"], 80)
    assert len(ids) == 80
    assert "A dog sitting in the grass. A dog" in model.tokenizer.decode(ids)


def test_a_prompt_that_does_not_fit_without_its_sentence_is_refused(tokenizer):
    with pytest.raises(ValueError, match="room for 10"):
        ids_of(tokenizer, "A dog.", PROMPTS["text"], 10)


def test_a_tokenizer_of_another_checkpoint_is_refused(model):
    with pytest.raises(ValueError, match="different checkpoints"):
        make(model.tokenizer, 7)
