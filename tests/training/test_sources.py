"""What a recipe may say of its sources."""

from __future__ import annotations

import pytest

from e5v_st.training.sources import Source, name_sources, read_sources


def test_an_entry_may_be_a_name_alone():
    assert read_sources(["pairs.csv"]) == [Source("pairs.csv")]


def test_negatives_have_the_prompt_of_positives_unless_they_have_their_own():
    source = Source("a.csv", prompt={"anchor": "composed", "positive": "image"})
    assert [source.prompt_of(role) for role in ("anchor", "positive", "negative_2")] == ["composed", "image", "image"]
    assert Source("a.csv", prompt={"positive": "image", "negative": "text"}).prompt_of("negative") == "text"
    assert Source("a.csv").prompt_of("anchor") is None


def test_sources_of_the_same_stem_are_numbered():
    names = name_sources([Source("a/pairs.csv"), Source("b/pairs.csv"), Source("me/data"), Source("c/pairs.tar")])
    assert list(names) == ["pairs", "pairs-2", "data", "pairs-3"]
    assert names["pairs-2"].data == "b/pairs.csv"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("a.csv", "want a list"),
        ([], "want a list"),
        ([{"weight": 2}], "entry 1: got"),
        (
            ["a.csv", {"data": "b.csv", "wieght": 2}],
            r"entry 2 \(b.csv\): there is no 'wieght' \(did you mean weight\?\)",
        ),
        ([{"data": "b.csv", "weight": 0}], "got weight=0, want more than 0"),
        ([{"data": "b.csv", "weight": -1.5}], "got weight=-1.5"),
        ([{"data": "b.csv", "weight": "2"}], "got weight='2', want a number"),
        ([{"data": "b.csv", "weight": True}], "want a number"),
        ([{"data": "b.csv", "prompt": "composed"}], "want a mapping"),
        ([{"data": "b.csv", "prompt": {"anchr": "text"}}], r"did you mean anchor\?"),
        ([{"data": "b.csv", "teacher": {"anchor": 3}}], "want a text for each role"),
        ([{"data": "b.csv", "split": 3}], "got split=3, want a text"),
    ],
)
def test_what_is_wrong_is_said_with_the_number_of_the_entry(entries, message):
    with pytest.raises(ValueError, match=message):
        read_sources(entries)
