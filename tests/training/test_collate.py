from __future__ import annotations

import e5v_st
from e5v_st.training.collate import cut_sentences


def test_only_sentences_that_are_too_long_are_cut(small):
    plain = e5v_st.load(small, device="cpu")[0].prompt_tokenizer.plain
    long = "Two men are playing chess in a park while it rains on <image> and more and more."
    short, cut = cut_sentences(plain, ["A  dog. ", long], 12)
    assert short == "A  dog. "
    assert long.startswith(cut)
    assert len(plain.encode(cut).ids) == 12
