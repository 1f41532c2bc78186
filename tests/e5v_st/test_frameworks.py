"""Adapters: LanceDB's embedding function, LangChain and LlamaIndex."""

from __future__ import annotations

import doctest
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import e5v_st
from e5v_st.frameworks import embed_texts, langchain_embeddings, llama_index_embedding


@pytest.fixture(scope="module")
def tiny():
    return e5v_st.load("e5v-tiny", device="cpu")


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """The name of an image in the working directory, which is a text all the same."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("photo.png")
    return "photo.png"


def test_a_text_that_names_an_image_is_still_a_text(tiny, photo):
    as_text, as_image = tiny.encode({"text": photo}), tiny.encode({"image": photo})
    assert as_text @ as_image < 0.9
    np.testing.assert_allclose(tiny.encode(photo), as_image, atol=1e-5)  # what the frameworks' own classes would get
    np.testing.assert_allclose(embed_texts(tiny, [photo])[0], as_text, atol=1e-5)


def test_langchain_gets_documents_and_queries_as_texts(tiny, photo, monkeypatch):
    try:
        from langchain_core.embeddings import Embeddings
    except ImportError:  # the adapter needs an abstract class with two methods, no more
        Embeddings = type("Embeddings", (), {})  # noqa: N806
        module = types.SimpleNamespace(Embeddings=Embeddings)
        monkeypatch.setitem(sys.modules, "langchain_core", types.ModuleType("langchain_core"))
        monkeypatch.setitem(sys.modules, "langchain_core.embeddings", module)
    embeddings = langchain_embeddings(tiny)
    assert isinstance(embeddings, Embeddings)
    expected = tiny.encode([{"text": photo}, {"text": "a dog"}])
    np.testing.assert_allclose(embeddings.embed_documents([photo, "a dog"]), expected, atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_query(photo), expected[0], atol=1e-5)


def test_llama_index_gets_texts_as_texts_and_images_as_images(tiny, photo):
    pytest.importorskip("llama_index.core")
    embedding = llama_index_embedding(tiny)
    np.testing.assert_allclose(embedding.get_text_embedding(photo), tiny.encode({"text": photo}), atol=1e-5)
    np.testing.assert_allclose(embedding.get_query_embedding(photo), tiny.encode({"text": photo}), atol=1e-5)
    np.testing.assert_allclose(embedding.get_image_embedding(photo), tiny.encode({"image": photo}), atol=1e-5)


# ---- LanceDB's embedding function ----


@pytest.fixture
def lancedb():
    return pytest.importorskip("lancedb")


def make_table(lancedb, tmp_path, kind, source):
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    from e5v_st.index.embedding_function import E5VEmbeddingFunction

    assert get_registry().get("e5v") is E5VEmbeddingFunction
    e5v = get_registry().get("e5v").create(name="e5v-tiny", device="cpu", source=source)

    class Row(LanceModel):
        cell: kind = e5v.SourceField()
        vector: Vector(e5v.ndims()) = e5v.VectorField()

    return lancedb.connect(tmp_path / "db").create_table("rows", schema=Row)


def test_lancedb_embeds_rows_of_texts_and_answers_texts_and_images(lancedb, tmp_path, tiny, photo):
    table = make_table(lancedb, tmp_path, str, "text")
    table.add([{"cell": "a red square"}, {"cell": photo}])
    expected = tiny.encode([{"text": "a red square"}, {"text": photo}])
    np.testing.assert_allclose(np.stack(table.to_arrow()["vector"].to_numpy()), expected, atol=1e-5)
    again = lancedb.connect(tmp_path / "db").open_table("rows")  # the table knows its function
    composed = {"image": photo, "text": "make it blue"}
    for query, item in (
        *(("a dog", {"text": "a dog"}), (Image.open(photo), {"image": photo}), (photo, {"text": photo})),
        (composed, composed),
    ):
        found = again.search(query).distance_type("cosine").limit(2).to_list()
        scores = {"a red square": 0, photo: 1}
        cosines = expected @ tiny.encode(item)
        np.testing.assert_allclose([1 - row["_distance"] for row in found], np.sort(cosines)[::-1], atol=1e-5)
        assert scores[found[0]["cell"]] == cosines.argmax()


def test_lancedb_embeds_rows_of_images_by_bytes_or_by_path(lancedb, tmp_path, tiny, photo):
    expected = tiny.encode({"image": photo})
    table = make_table(lancedb, tmp_path / "a", bytes, "text")
    table.add([{"cell": Path(photo).read_bytes()}])
    np.testing.assert_allclose(table.to_arrow()["vector"][0].as_py(), expected, atol=1e-5)
    table = make_table(lancedb, tmp_path / "b", str, "image")
    table.add([{"cell": photo}])
    np.testing.assert_allclose(table.to_arrow()["vector"][0].as_py(), expected, atol=1e-5)


def test_a_bad_row_is_said_at_once(lancedb, tmp_path):
    table = make_table(lancedb, tmp_path, bytes, "image")
    with pytest.raises(RuntimeError, match="item 0: cannot read"):
        table.add([{"cell": b"broken"}])


def test_the_example_of_the_function_runs(lancedb):
    from e5v_st.index.embedding_function import E5VEmbeddingFunction

    example = doctest.DocTestParser().get_doctest(E5VEmbeddingFunction.__doc__, {}, "e5v", None, None)
    said = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert tried > 5
    assert not failed, "".join(said)
