"""The tasks against the goldens, and against a plain NumPy reading of the protocol."""

from __future__ import annotations

import json
import os

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.input_module import InputModule

from e5v_st.mteb_tasks.recording import Recorder

KWARGS = {"encode_kwargs": {"show_progress_bar": False}}


def run(task, model, split="test", subset="default"):
    return task.evaluate(model, split, [subset], **KWARGS)[subset]


def fill(task, corpus_ids, query_ids, relevant, split="test", **columns):
    """Gives a task made-up data: every picture is the same, only ids matter."""
    dot = Image.new("RGB", (2, 2))
    modalities = {"t": "text", "i": "image"}
    query_side, document_side = task.metadata.category.split("2")

    def rows(ids, side, **more):
        own = {modalities[m]: ["x"] * len(ids) if m == "t" else [dot] * len(ids) for m in side}
        return Dataset.from_dict({"id": ids, **own, **more})

    data = {
        "corpus": rows(corpus_ids, document_side),
        "queries": rows(query_ids, query_side, **columns),
        "relevant_docs": relevant,
        "top_ranked": None,
    }
    task.dataset = {subset: {split: data} for subset in task.hf_subsets}
    task.data_loaded = True
    return task


def unit(rng, ids, d=8):
    vectors = rng.normal(size=(len(ids), d)).astype(np.float32)
    return dict(zip(ids, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))


def numpy_hit_rate(queries, documents, relevant, k, masked=None, candidates=None):
    """The protocol, read plainly: rank all documents, ties by id from Z to A, the reference at -1."""
    hits = []
    for name, query in queries.items():
        own = candidates[name] if candidates else list(documents)
        scores = {other: float(np.float32(query @ documents[other])) for other in own}
        if masked:
            scores[masked[name]] = -1.0
        order = sorted(sorted(scores, reverse=True), key=lambda other: -scores[other])
        hits.append(bool(set(order[:k]) & set(relevant[name])))
    return np.mean(hits)


def test_recalls_are_those_of_the_published_code_on_given_embeddings(goldens, given):
    golden = json.loads((goldens / "metrics.json").read_text())
    images = {str(i): np.float32(row) for i, row in enumerate(golden["image_embeddings"])}
    texts = {f"{i // 5}-{i % 5}": np.float32(row) for i, row in enumerate(golden["text_embeddings"])}
    by_text = {name: {name.split("-")[0]: 1} for name in texts}
    by_image = {image: {name: 1 for name in texts if name.split("-")[0] == image} for image in images}

    t2i = fill(mteb.get_task("E5VCOCOT2IRetrieval"), list(images), list(texts), by_text)
    i2t = fill(mteb.get_task("E5VCOCOI2TRetrieval"), list(texts), list(images), by_image)
    found = {
        "image": run(t2i, given({"query": texts, "document": images})),
        "text": run(i2t, given({"query": images, "document": texts})),
    }
    for side, scores in found.items():
        for k in (1, 5, 10):
            assert scores[f"hit_rate_at_{k}"] == pytest.approx(golden["metrics"][f"{side}_retrieval_recall@{k}"], 1e-6)
        assert scores["main_score"] == scores["hit_rate_at_1"]


@pytest.mark.parametrize("ties", [False, True])
def test_fashioniq_is_numpys_reading_of_the_protocol(given, ties):
    rng = np.random.default_rng(7)
    corpus, queries = [f"d{i:03}" for i in range(120)], [f"q{i:02}" for i in range(40)]
    documents, asked = unit(rng, corpus), unit(rng, queries)
    if ties:  # every second document equals the one before it
        documents.update({corpus[i + 1]: documents[corpus[i]] for i in range(0, 120, 2)})
    relevant = {name: {corpus[rng.integers(120)]: 1} for name in queries}
    task = fill(mteb.get_task("E5VFashionIQRetrieval"), corpus, queries, relevant, "val", captions=["a\nb"] * 40)
    scores = run(task, given({"query": asked, "document": documents}), "val", "dress")
    for k in (10, 50):
        expected = numpy_hit_rate(asked, documents, relevant, k)
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(expected, abs=1e-5)
    assert scores["main_score"] == scores["hit_rate_at_10"]


@pytest.mark.parametrize("ties", [False, True])
def test_cirr_masks_the_reference_and_ranks_within_the_subset(given, ties):
    rng = np.random.default_rng(5)
    corpus, queries = [f"d{i:03}" for i in range(80)], [f"q{i:02}" for i in range(60)]
    documents = unit(rng, corpus)
    if ties:
        documents.update({corpus[i + 1]: documents[corpus[i]] for i in range(0, 80, 2)})
    reference = {name: corpus[rng.integers(80)] for name in queries}
    # Queries close to their reference: without the mask it would always come first
    asked = {name: documents[reference[name]] + 0.1 * unit(rng, ["x"])["x"] for name in queries}
    members = {}
    relevant = {}
    for name in queries:
        others = [other for other in rng.permutation(corpus) if other != reference[name]][:5]
        members[name] = [reference[name], *others]
        relevant[name] = {others[0]: 1}
    columns = {
        "reference": [reference[name] for name in queries],
        "members": ["\n".join(members[name]) for name in queries],
    }
    task = fill(mteb.get_task("E5VCIRRRetrieval"), corpus, queries, relevant, "val", **columns)
    scores = run(task, given({"query": asked, "document": documents}), "val")
    for k in (1, 5, 10, 50):
        expected = numpy_hit_rate(asked, documents, relevant, k, masked=reference)
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(expected, abs=1e-5)
    for k in (1, 2, 3):
        expected = numpy_hit_rate(asked, documents, relevant, k, reference, members)
        assert scores[f"recall_subset_at_{k}"] == pytest.approx(expected, abs=1e-5)
    assert scores["hit_rate_at_50"] > 0
    best = {entry["id"] for example in scores["details"]["examples"] for entry in example["best"][:1]}
    assert best.isdisjoint({reference[e["query"]] for e in scores["details"]["examples"]}) or ties


@pytest.mark.parametrize(
    ("name", "split", "subset", "golden", "role"),
    [
        ("E5VCIRRRetrieval", "val", "default", "cirr_query", "query"),
        ("E5VCIRRRetrieval", "val", "default", "cirr_gallery", "document"),
        ("E5VFashionIQRetrieval", "val", "dress", "fashioniq_dress_query", "query"),
        ("E5VFashionIQRetrieval", "val", "dress", "fashioniq_dress_gallery", "document"),
        ("E5VFashionIQRetrieval", "val", "toptee", "fashioniq_shirt_query", "query"),
        ("E5VFashionIQRetrieval", "val", "toptee", "fashioniq_shirt_gallery", "document"),
        ("E5VFlickr30kI2TRetrieval", "test", "default", "image", "query"),
        ("E5VCOCOT2IRetrieval", "test", "default", "image", "document"),
    ],
)
def test_embeddings_of_a_task_are_the_goldens(name, split, subset, golden, role, goldens, e5v, local_data):
    recorder = Recorder(e5v)
    run(mteb.get_task(name), recorder, split, subset)
    expected = np.load(goldens / "small.upstream.npz")[golden]
    np.testing.assert_allclose(recorder.of(role), expected, atol=2e-6)


def test_embeddings_of_sts_are_the_goldens(goldens, e5v, local_data):
    recorder = Recorder(e5v)
    task = mteb.get_task("E5VSTSBenchmark")
    scores = run(task, recorder)
    numbers = np.load(goldens / "small.upstream.npz")
    row = {str(text): i for i, text in enumerate(numbers["texts"])}
    sentences = [*task.dataset["test"]["sentence1"], *task.dataset["test"]["sentence2"]]
    for sentence, embedding in zip(sentences, recorder.of("input"), strict=True):
        # SentEval has no empty sentences, and none with spaces at its ends: the goldens' edits leave those as they are
        if sentence in row and sentence.strip() == sentence != "":
            np.testing.assert_allclose(embedding, numbers["sts"][row[sentence]], atol=2e-6)
    assert scores["main_score"] == scores["cosine_spearman"]


def test_texts_of_documents_are_embedded_as_they_are_written(e5v, local_data, goldens):
    """mteb strips the texts of documents; "trailing space " is one of the goldens' texts."""
    recorder = Recorder(e5v)
    task = mteb.get_task("E5VFlickr30kI2TRetrieval")
    task.load_data()
    numbers = np.load(goldens / "small.upstream.npz")
    corpus = task.dataset["default"]["test"]["corpus"]
    texts = [str(text) for text in numbers["texts"]]
    task.dataset["default"]["test"]["corpus"] = corpus.remove_columns("text").add_column(
        "text", [texts[i % 9] for i in range(len(corpus))]
    )
    run(task, recorder)
    np.testing.assert_allclose(recorder.of("document")[:9], numbers["text"], atol=2e-6)


def test_coco_takes_the_first_five_captions(local_data):
    task = mteb.get_task("E5VCOCOI2TRetrieval")
    task.load_data()
    data = task.dataset["default"]["test"]
    assert len(data["corpus"]) == 40
    assert {len(own) for own in data["relevant_docs"].values()} == {5}


def test_sickr_wants_the_test_part_alone(published, tmp_path, monkeypatch):
    import gzip

    folder = tmp_path / "mteb" / "sickr-sts"
    folder.mkdir(parents=True)
    with gzip.open(folder / "test.jsonl.gz", "wt") as file:
        file.write(json.dumps({"sentence1": "a", "sentence2": "b", "score": 1.0}))
    monkeypatch.setenv("E5V_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="want 4927"):
        mteb.get_task("E5VSICKR").load_data()


def test_local_data_that_changed_are_read_again_though_their_time_did_not(tmp_path, monkeypatch):
    folder = tmp_path / "mteb" / "sts12-sts"
    folder.mkdir(parents=True)
    monkeypatch.setenv("E5V_DATA", str(tmp_path))
    for score in (1.5, 2.5):
        (folder / "test.jsonl").write_text(json.dumps({"sentence1": "a", "sentence2": "b", "score": score}))
        os.utime(folder / "test.jsonl", (1_700_000_000, 1_700_000_000))
        task = mteb.get_task("E5VSTS12")
        task.load_data()
        assert task.dataset["test"]["score"][:] == [score]


def test_local_scores_that_are_text_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "mteb" / "sts12-sts"
    folder.mkdir(parents=True)
    monkeypatch.setenv("E5V_DATA", str(tmp_path))
    (folder / "test.csv").write_text('sentence1,sentence2,score\na,b,10\nc,d,"4,5"\n')
    with pytest.raises(ValueError, match=r"sts12-sts \(test\): the column 'score' holds text, want numbers"):
        mteb.get_task("E5VSTS12").load_data()


def test_missing_local_data_says_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("E5V_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not hold royokong/coco_test"):
        mteb.get_task("E5VCOCOT2IRetrieval").load_data()


class TestCIRRTest:
    def evaluate(self, e5v, tmp_path):
        task = mteb.get_task("E5VCIRRTest")
        task.evaluate(e5v, "test", prediction_folder=tmp_path, **KWARGS)
        return {file.name: json.loads(file.read_text()) for file in tmp_path.rglob("*.json")}

    def test_writes_the_file_that_the_server_takes(self, e5v, local_data, tmp_path):
        with pytest.warns(UserWarning, match="recall_subset"):
            files = self.evaluate(e5v, tmp_path)
        assert list(files) == ["cirr_recall.json"]
        content = files["cirr_recall.json"]
        assert (content.pop("version"), content.pop("metric")) == ("rc2", "recall")
        assert set(content) == {str(i) for i in range(24)}
        for pair, ids in content.items():
            assert len(set(ids)) == 50
            assert f"test{int(pair) // 3}" not in ids  # the reference

    def test_writes_the_second_file_where_subsets_are_known(self, e5v, published, tmp_path, monkeypatch, goldens):
        changes = [str(change) for change in np.load(goldens / "small.upstream.npz")["changes"]]
        entries = [
            {
                "reference": f"test{i}",
                "caption": change,
                "img_set": {"members": [f"test{(i + n) % 60}" for n in range(6)]},
            }
            for i in range(8)
            for change in changes
        ]
        data = tmp_path / "data"
        (data / "cirr").mkdir(parents=True)
        (data / "royokong").symlink_to(published / "royokong")
        (data / "cirr" / "cap.rc2.test1.json").write_text(json.dumps(entries))
        monkeypatch.setenv("E5V_DATA", str(data))
        files = self.evaluate(e5v, tmp_path / "out")
        content = files["cirr_recall_subset.json"]
        assert content["metric"] == "recall_subset"
        assert all(len(ids) == 3 and f"test{int(p) // 3}" not in ids for p, ids in content.items() if p.isdigit())

    def test_refuses_a_file_that_is_too_large(self, tmp_path):
        from e5v_st.mteb_tasks.cir import write_submission

        results = {str(i): {f"{'x' * 2000}{n}": float(n) for n in range(50)} for i in range(60)}
        with pytest.raises(ValueError, match="the server takes 5000000"):
            write_submission(tmp_path, "recall", results)
        assert not list(tmp_path.iterdir())


class ClipLike(InputModule):
    """A first module of a sentence-transformers model for texts, images and both; it knows nothing of E5-V."""

    modalities = ("text", "image", ("image", "text"))

    def preprocess(self, inputs, prompt=None, **_):
        return {"features": torch.tensor(np.stack([self.look_at(value) for value in inputs]), dtype=torch.float32)}

    def look_at(self, value):
        parts = value if isinstance(value, dict) else {"text" if isinstance(value, str) else "image": value}
        vector = np.ones(16)
        if "text" in parts:
            vector += [ord(letter) % 7 for letter in f"{parts['text']:16}"[:16]]
        if "image" in parts:
            vector += np.asarray(parts["image"].convert("L").resize((4, 4)), float).ravel()
        return vector

    def forward(self, features):
        return {**features, "sentence_embedding": features["features"]}

    def get_embedding_dimension(self):
        return 16

    def save(self, *_, **__):
        raise NotImplementedError


@pytest.mark.parametrize("benchmark", ["E5V", "E5V(tiny)"])
def test_every_task_runs_for_any_other_model(benchmark, local_data, tmp_path):
    model = mteb.SentenceTransformerEncoderWrapper(SentenceTransformer(modules=[ClipLike()], device="cpu"))
    # mteb finds the modalities of models that are registered, or have a configuration on the hub
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"modalities": ["image", "text"]})
    tasks = [t for t in mteb.get_benchmark(benchmark).tasks if t.metadata.name != "E5VSICKR"]
    result = mteb.evaluate(model, tasks, cache=None, prediction_folder=tmp_path, show_progress_bar=False)
    assert len(result.task_results) == len(tasks)
    for task in result.task_results:
        if task.task_name != "E5VCIRRTest":
            assert np.isfinite(task.get_score())
