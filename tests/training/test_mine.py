"""Hard negatives from an index, against sentence-transformers' own mining."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

import e5v_st
from e5v_st.cli import main
from e5v_st.training.item_rows import load_items
from e5v_st.training.sources import Source

WORDS = ["dog", "cat", "horse", "red apple", "green apple", "tea", "coffee", "night", "day", "rain", "snow", "sun"]
PAIRS = [("a canine", "dog"), ("a kitten", "cat"), ("fruit that is red", "red apple"), ("hot drink", "tea")]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mined")
    (folder / "words.csv").write_text("id,text\n" + "\n".join(f"w{n},{word}" for n, word in enumerate(WORDS)) + "\n")
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["embed", str(folder / "words.csv"), str(folder / "index"), "--model", "e5v-tiny"]) == 0
    return folder


@pytest.mark.parametrize("margin", [0.0, 0.1, -2.0])
@pytest.mark.parametrize("negatives", [1, 2])
def test_negatives_are_those_of_the_stock_mining(index, tmp_path, capsys, negatives, margin):
    expected = mine_hard_negatives(
        Dataset.from_list([{"anchor": anchor, "positive": positive} for anchor, positive in PAIRS]),
        e5v_st.load("e5v-tiny", device="cpu"),
        corpus=WORDS,
        range_max=12,
        absolute_margin=margin,
        num_negatives=negatives,
        output_format="n-tuple",
        verbose=False,
    )
    wanted = {row["anchor"]: [value for name, value in row.items() if name.startswith("negative")] for row in expected}
    out = tmp_path / "mined.parquet"
    words = ["mine", str(index / "pairs.jsonl"), str(index / "index"), "--out", str(out), "--range", "1:12"]
    code = main([*words, "--margin", str(margin), "--negatives", str(negatives)])
    said = capsys.readouterr()
    if not wanted:
        assert code == 1
        assert "no row has" in said.err
        return
    assert code == 0
    rows = pq.read_table(out).to_pylist()
    found = {
        r["anchor_text"]: [v for k, v in r.items() if k.startswith("negative") and k.endswith("_text")] for r in rows
    }
    assert found == wanted
    assert f"{len(wanted)} of 4 rows have {negatives} negative(s)" in said.out


def test_ranks_count_all_that_is_near_but_the_positive(index, tmp_path):
    model = e5v_st.load("e5v-tiny", device="cpu")
    scores = model.encode([anchor for anchor, _ in PAIRS]) @ model.encode(WORDS).T
    out = tmp_path / "mined.parquet"
    words = ["mine", str(index / "pairs.jsonl"), str(index / "index"), "--out", str(out), "--range", "3:8"]
    assert main([*words, "--margin", "-2"]) == 0
    for row, (_, positive), own in zip(pq.read_table(out).to_pylist(), PAIRS, scores, strict=True):
        others = [WORDS[place] for place in (-own).argsort() if WORDS[place] != positive]
        assert row["negative_text"] == others[2]
        assert row["negative_cosine"] == pytest.approx(own[WORDS.index(others[2])], abs=1e-5)


def test_the_share_of_suspects_is_counted(index, tmp_path, capsys):
    words = ["mine", str(index / "pairs.jsonl"), str(index / "index"), "--out", str(tmp_path / "m.parquet")]
    assert main([*words, "--range", "1:12", "--margin", "-2"]) == 0
    assert "Of 44 candidates within the ranks 1:12, 0 (0.0 %)" in capsys.readouterr().out  # all but each positive
    assert main([*words, "--range", "1:12", "--margin", "2"]) == 1


def test_what_is_written_can_be_trained_on(index, tmp_path):
    out = tmp_path / "mined.parquet"
    words = ["mine", str(index / "pairs.jsonl"), str(index / "index"), "--out", str(out), "--range", "1:12"]
    assert main([*words, "--margin", "-2", "--negatives", "2"]) == 0
    data, _ = load_items(Source(str(out)))
    assert data.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert len(data) == 4


def test_a_source_that_has_changed_since_is_refused(index, tmp_path, capsys):
    import shutil

    shutil.copytree(index, tmp_path / "moved")
    (tmp_path / "moved" / "words.csv").write_text("id,text\nw0,other\n")
    words = [
        "mine",
        str(index / "pairs.jsonl"),
        str(tmp_path / "moved" / "index"),
        "--out",
        str(tmp_path / "m.parquet"),
    ]
    assert main(words) == 1
    assert "has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--range", "5"], "want two ranks from 1"),
        (["--range", "9:3"], "want two ranks from 1"),
        (["--negatives", "0"], "want at least 1"),
        (["--out", "mined.csv"], "want a .parquet file"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(index, tmp_path, capsys, words, message):
    given = ["mine", str(index / "pairs.jsonl"), str(index / "index"), "--out", str(tmp_path / "m.parquet"), *words]
    assert main(given) == 1
    assert message in capsys.readouterr().err
