"""``e5v search`` on tables of LanceDB, against NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import e5v_st
from e5v_st.cli import main
from e5v_st.index import lance_table
from e5v_st.index.lance_table import create, keep_indices, open_lance, put
from e5v_st.index.table_search import open_for_search, search_table, vector_of

pytest.importorskip("lancedb")

DIMENSION = 16
TEXTS = ("a dog in the snow", "a cat on a mat", "snow on a roof", "two dogs", "nothing of it")


def make(path, count=60, dimension=DIMENSION, **job):
    """A table of random rows without a model."""
    said = dict.fromkeys(lance_table.JOB) | {"format": 1, "dimension": dimension, "columns": {"price": "float"}, **job}
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, dimension)).astype(np.float32)
    table = create(path, said)
    rows = [
        {"id": f"r{n}", "vector": vectors[n], "content": str(n), "details": "", "text": TEXTS[n % 5], "price": n / 2}
        for n in range(count)
    ]
    put(table, rows, path)
    return table, vectors


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.lance"
    table, vectors = make(path)
    keep_indices(table, path, ["text"])
    return open_lance(path), vectors


def cosines(query, vectors):
    return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)


def test_ranks_and_scores_are_those_of_the_cosine(table):
    table, vectors = table
    query = np.random.default_rng(1).normal(size=DIMENSION).astype(np.float32) * 3
    expected = cosines(query, vectors)
    found = search_table(table, query, top=7)
    assert [row["id"] for row in found] == [f"r{n}" for n in np.argsort(-expected)[:7]]
    np.testing.assert_allclose([row["score"] for row in found], np.sort(expected)[::-1][:7], atol=1e-5)


def test_a_filter_is_applied_before_the_search(table):
    table, vectors = table
    query = np.ones(DIMENSION, np.float32)
    allowed = np.array([n for n in range(60) if n / 2 > 20 and TEXTS[n % 5] == "two dogs"])
    found = search_table(table, query, where="price > 20 AND text = 'two dogs'", top=50)
    assert [row["id"] for row in found] == [f"r{n}" for n in allowed[np.argsort(-cosines(query, vectors[allowed]))]]


def test_words_are_found_in_the_text_alone_or_together_with_the_embedding(table):
    table, vectors = table
    found = search_table(table, None, "snow", mode="text", top=60)
    assert {row["text"] for row in found} == {"a dog in the snow", "snow on a roof"}
    both = search_table(table, vectors[5], "snow", mode="hybrid", top=3)
    assert both[0]["id"] in ("r5", "r0", "r2")
    assert all(row["score"] > 0 for row in both)
    assert len(search_table(table, vectors[5], "snow", mode="hybrid", where="price < 1", top=60)) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"where": "nope > 3"}, "the condition 'nope > 3' cannot be read"),
        ({"where": "price >"}, "cannot be read"),
        ({"mode": "text", "text": "dog", "text_column": "image"}, "no full-text index"),
        ({"vector": np.ones(5, np.float32)}, "embeddings of 16 numbers, the model of 5"),
        ({"vector": np.full(16, np.nan, np.float32)}, "not finite"),
    ],
)
def test_what_cannot_be_searched_is_said(table, more, message):
    arguments = {"vector": np.ones(DIMENSION, np.float32), **more}
    with pytest.raises(ValueError, match=message):
        search_table(table[0], **arguments)


@pytest.mark.parametrize("dimension", [64, 50])
def test_with_an_index_scores_are_exact_and_nearly_every_neighbour_is_found(dimension, tmp_path, monkeypatch):
    monkeypatch.setattr(lance_table, "ANN_ROWS", 1000)
    path = tmp_path / "t.lance"
    table, vectors = make(path, count=3000, dimension=dimension)
    keep_indices(table, path)
    assert lance_table.index_of(table, "vector") is not None
    recall = []
    for query in np.random.default_rng(2).normal(size=(20, dimension)).astype(np.float32):
        expected = cosines(query, vectors)
        found = search_table(table, query, top=10)
        numbers = [int(row["id"][1:]) for row in found]
        np.testing.assert_allclose([row["score"] for row in found], expected[numbers], atol=1e-5)
        recall.append(len(set(numbers) & set(np.argsort(-expected)[:10].tolist())) / 10)
        exact = search_table(table, query, top=10, exact=True)
        assert [int(row["id"][1:]) for row in exact] == np.argsort(-expected)[:10].tolist()
    assert np.mean(recall) >= 0.98


def test_an_embedding_is_found_by_its_id(table):
    np.testing.assert_array_equal(vector_of(table[0], "r7"), table[1][7])
    with pytest.raises(ValueError, match='no row "it\'s"'):
        vector_of(table[0], "it's")


# ---- the command ----


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A table of five images and its folder, of the small model."""
    root = tmp_path_factory.mktemp("indexed")
    (root / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (30 + 10 * number, 40), colour).save(root / "images" / f"{colour}.png")
    words = ["--model", "e5v-tiny", "--device", "cpu"]
    assert main(["index", str(root / "images"), str(root / "t.lance"), "--thumbnails", "16", *words]) == 0
    assert main(["embed", str(root / "images"), str(root / "shards"), *words]) == 0
    return root


def test_a_table_and_a_folder_of_shards_give_the_same_result(indexed, capsys):
    capsys.readouterr()
    found = []
    for name in ("t.lance", "shards"):
        image = indexed / "images" / "red.png"
        assert main(["search", str(indexed / name), "make it blue", "--image", str(image), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [row["id"] for row in found[0]] == [row["id"] for row in found[1]]
    assert [row["rank"] for row in found[0]] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([r["score"] for r in found[0]], [r["score"] for r in found[1]], atol=1e-5)
    assert found[0][0].keys() >= {"width", "height", "text", "image"}
    assert not found[0][0].keys() & {"vector", "content", "thumbnail"}


def test_the_command_filters_prints_and_writes_a_page(indexed, capsys, tmp_path):
    capsys.readouterr()
    page = tmp_path / "page.html"
    words = ["search", str(indexed / "t.lance"), "a colour", "--where", "width > 40", "--top", "2", "--html", str(page)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert not any(name in line for line in lines for name in ("red", "green"))
    assert page.read_text().count("<img alt") == 2
    assert main([*words, "--where", "width > 4000"]) == 0
    assert "no such rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("shards", ["--where", "width > 1"], "make a table with `e5v index"),
        ("t.lance", ["--mode", "hybrid"], "no full-text index"),
        ("t.lance", ["--model", "royokong/none"], "royokong/none"),
        ("none.lance", [], "there is no table"),
    ],
)
def test_a_search_of_a_table_that_cannot_be_is_refused(indexed, name, more, message, capsys):
    assert main(["search", str(indexed / name), "a dog", *more]) == 1
    assert message in capsys.readouterr().err


FIXTURES = sorted((Path(__file__).parents[2] / "data" / "tables").iterdir())


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.name)
def test_tables_that_earlier_versions_made_are_read(fixture):
    table, job = open_for_search(fixture / "rows.lance")
    rows = [json.loads(line) for line in (fixture / "rows.jsonl").read_text().splitlines()]
    expected = json.loads((fixture / "found.json").read_text())
    found = search_table(table, vector_of(table, "row-2"), top=5)
    np.testing.assert_allclose([row.pop("score") for row in found], [row.pop("score") for row in expected], atol=1e-5)
    assert found == expected
    assert {row["text"] for row in found} == {row["caption"] for row in rows}
    assert [row["id"] for row in search_table(table, None, "heart", mode="text")] == ["row-0"]
    assert job["model"] == "e5v-tiny"
    assert len(job["weights_sha256"]) == 64
    model = e5v_st.load("e5v-tiny", device="cpu")
    np.testing.assert_allclose(vector_of(table, "row-2"), model.encode({"text": "it's a dog"}), atol=1e-4)


def test_a_table_of_a_later_version_or_of_others_is_refused(tmp_path):
    make(tmp_path / "later.lance", format=99)
    with pytest.raises(ValueError, match="a later version, in format 99"):
        open_for_search(tmp_path / "later.lance")
    import lancedb

    lancedb.connect(tmp_path).create_table("other", [{"id": "1", "vector": [1.0, 2.0]}])
    with pytest.raises(ValueError, match="does not say which model made it"):
        open_for_search(tmp_path / "other.lance")
    (tmp_path / "folder.lance").mkdir()
    (tmp_path / "folder.lance" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="is not a table of LanceDB"):
        open_for_search(tmp_path / "folder.lance")
