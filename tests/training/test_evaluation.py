"""What is measured while training, read from local files."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import spearmanr

import e5v_st
from e5v_st.training.evaluation import make_evaluators
from e5v_st.training.examples import load_triplets, read_split

SCORES = [10.0, 4.0, 0.5, 9.0]
PAIRS = pd.DataFrame(
    {"sentence1": ["A dog.", "A cat.", "Rain.", "A car."], "sentence2": ["Dogs.", "A sofa.", "Sun.", "Cars."]}
)


def test_scores_of_a_csv_are_ranked_as_numbers(tmp_path, small):
    PAIRS.assign(score=SCORES).to_csv(tmp_path / "sts.csv", index=False)
    (evaluator,) = make_evaluators(sts=str(tmp_path / "sts.csv"))
    assert evaluator.scores == SCORES
    model = e5v_st.load(small, device="cpu")
    embeddings = [model.encode([{"text": text} for text in PAIRS[name]]) for name in ("sentence1", "sentence2")]
    expected = spearmanr((embeddings[0] * embeddings[1]).sum(1), SCORES).statistic
    assert evaluator(model)["sts_spearman_cosine"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": ["10", "4,5", "1", "2"]}, r"sts\.csv, line 3, column 'score': got '4,5', want a number"),
        ({"score": ["10", None, "1", "2"]}, r"sts\.csv, line 3, column 'score': got None, want a number"),
        ({"score": SCORES, "sentence2": ["a", "b", "", "d"]}, r"line 4, column 'sentence2': got None, want a text"),
        ({"score": SCORES, "sentence2": ["a", "b", " ", "d"]}, "line 4, column 'sentence2': got ' ', want a text"),
        ({"score": SCORES, "gallery": ["true", "no!", "1", "0"]}, "line 3, column 'gallery': got 'no!', want true or"),
        ({"score": SCORES, "split": ["test", "", "test", "test"]}, "line 3: the column 'split' is empty"),
    ],
)
def test_what_is_no_number_text_or_truth_value_is_refused_with_its_line(tmp_path, change, message):
    PAIRS.assign(**change).to_csv(tmp_path / "sts.csv", index=False)
    with pytest.raises(ValueError, match=message):
        make_evaluators(sts=str(tmp_path / "sts.csv"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_rows_outside_the_gallery_are_left_out_of_every_format(tmp_path, suffix):
    frame = pd.DataFrame({"id": ["a", "b", "c"], "gallery": [True, False, True]})
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    assert [row["id"] for _, row in read_split(str(path), "validation")] == frame["id"][frame["gallery"]].tolist()


def test_images_lie_beside_their_table_wherever_the_training_starts(tmp_path, small, monkeypatch):
    (tmp_path / "data" / "photos").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    texts = ["red", "green"]
    images = [Image.new("RGB", (40, 40), text) for text in texts]
    for number, image in enumerate(images):
        image.save(tmp_path / "data" / "photos" / f"{number}.png")
    lines = [json.dumps({"image": f"photos/{i}.png", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "data" / "images.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path / "elsewhere")
    (evaluator,) = make_evaluators(images="../data/images.jsonl")
    model = e5v_st.load(small, device="cpu")
    scores = model.encode(texts) @ model.encode(images).T
    expected = sum(scores[i, i] > scores[i, 1 - i] for i in range(2)) / 2
    assert evaluator(model)["t2i_recall@1"] == pytest.approx(expected)


def test_captions_of_one_image_do_not_count_against_each_other(tmp_path, small, goldens):
    files = sorted((goldens / "images/small").glob("*.png"))[:4]
    images = [Image.open(file).convert("RGB") for file in files]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
        image.save(tmp_path / f"{number}.bmp")
    captions = [f"caption {number}" for number in range(8)]
    rows = [{"image": f"{i % 4}.{'png' if i < 4 else 'bmp'}", "text": text} for i, text in enumerate(captions)]
    pd.DataFrame(rows).to_csv(tmp_path / "images.csv", index=False)
    (evaluator,) = make_evaluators(images=str(tmp_path / "images.csv"))
    model = e5v_st.load(small, device="cpu")
    # Of the four images, how many score at least as high as the right one
    scores = model.encode(captions) @ model.encode(images).T
    rank = np.array([(row >= row[i % 4]).sum() for i, row in enumerate(scores)])
    assert evaluator(model) == pytest.approx({"t2i_recall@1": (rank == 1).mean(), "t2i_recall@5": 1})


def test_an_image_that_cannot_be_read_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "images.csv").write_text("image,text\nnone.png,red\n")
    with pytest.raises(ValueError, match=r"image 0: cannot read .*none\.png.* as an image: there is no such file"):
        make_evaluators(images=str(tmp_path / "images.csv"))


@pytest.fixture
def evaluators(tmp_path, goldens):
    """One of each kind."""
    PAIRS.assign(score=SCORES).to_csv(tmp_path / "sts.csv", index=False)
    (tmp_path / "triplets.csv").write_text("anchor,positive,negative\na,b,c\n")
    files = sorted(map(str, (goldens / "images/small").glob("*.png")))
    pd.DataFrame({"image": files, "text": files}).to_csv(tmp_path / "images.csv", index=False)
    triplets, _ = load_triplets(str(tmp_path / "triplets.csv"))
    return make_evaluators(str(tmp_path / "sts.csv"), triplets, str(tmp_path / "images.csv"))


def test_held_out_pairs_are_refused_as_nothing_is_measured_on_them(tmp_path):
    pd.DataFrame({"anchor": ["a", "b"], "positive": ["A", "B"]}).to_csv(tmp_path / "pairs.csv", index=False)
    pairs, _ = load_triplets(str(tmp_path / "pairs.csv"))
    with pytest.raises(ValueError, match="the held-out rows are pairs, want triplets, with a column 'negative'"):
        make_evaluators(triplets=pairs)


@pytest.mark.parametrize("kind", range(3), ids=["graded pairs", "triplets", "text to image"])
def test_embeddings_that_are_not_finite_have_no_score(evaluators, small, kind):
    model = e5v_st.load(small, device="cpu")
    model[0].model.language_model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"(\d+) of \1 embeddings are not finite.*lower the learning rate"):
        evaluators[kind](model)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_one_embedding_for_all_texts_has_no_correlation(evaluators, small):
    model = e5v_st.load(small, device="cpu")
    model[0].model.language_model.norm.weight.data.zero_()
    with pytest.raises(ValueError, match="sts_pearson_cosine is nan: the model gives all pairs the same similarity"):
        evaluators[0](model)


@pytest.mark.parametrize("scores", [[3.0] * 4, [3.0]], ids=["constant scores", "one row"])
def test_graded_pairs_without_two_different_scores_are_refused(tmp_path, scores):
    PAIRS[: len(scores)].assign(score=scores).to_csv(tmp_path / "sts.csv", index=False)
    with pytest.raises(ValueError, match=rf"sts\.csv: the score of all {len(scores)} rows .* is 3, want at least two"):
        make_evaluators(sts=str(tmp_path / "sts.csv"))


def test_a_text_that_names_an_image_is_a_text(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["red.png", "green.png", "blue.png", "black.png"]
    for name in texts:
        Image.new("RGB", (40, 40), name.removesuffix(".png")).save(name)
    frame = pd.DataFrame({"sentence1": texts, "sentence2": texts[::-1], "score": SCORES})
    frame["sentence2"] += " is a file"
    frame.to_csv("sts.csv", index=False)
    triplets = pd.DataFrame({"anchor": frame["sentence2"], "positive": texts, "negative": [*texts[1:], texts[0]]})
    triplets.to_csv("triplets.csv", index=False)
    graded, ranked = make_evaluators("sts.csv", load_triplets("triplets.csv")[0])

    as_texts = e5v_st.load(small, device="cpu", strings="text")
    found = {name: as_texts.encode(list(column)) for name, column in {**frame, **triplets}.items() if name != "score"}
    similarity = (found["sentence1"] * found["sentence2"]).sum(1)
    right = (found["anchor"] * (found["positive"] - found["negative"])).sum(1) > 0
    model = e5v_st.load(small, device="cpu")
    assert graded(model)["sts_spearman_cosine"] == pytest.approx(spearmanr(similarity, SCORES).statistic, abs=1e-6)
    assert ranked(model)["triplets_cosine_accuracy"] == pytest.approx(right.mean())


def test_how_a_file_was_read_is_told(tmp_path, caplog):
    (tmp_path / "rows.csv").write_text("id,split\n1,validation\n\n2,validation\n")
    assert len(read_split(str(tmp_path / "rows.csv"), "validation")) == 2
    assert caplog.messages == [f"{tmp_path / 'rows.csv'}: 1 empty line left out: line 3"]


def test_a_row_without_an_image_is_refused_with_its_line(tmp_path):
    (tmp_path / "images.csv").write_text("image,text\na.png,red\n,green\n")
    with pytest.raises(ValueError, match=r"images\.csv, line 3, column 'image': got None, want an image"):
        make_evaluators(images=str(tmp_path / "images.csv"))


def test_training_reads_a_stray_quote_and_a_line_separator_without_losing_a_row(tmp_path):
    rows = [{"anchor": f"a{i}", "positive": text} for i, text in enumerate(['"open', "b", 'c "', "d\u2028e", "f\x85g"])]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf8")
    lines = ["anchor\tpositive", *("\t".join(row.values()) for row in rows)]
    (tmp_path / "a.tsv").write_text("\n".join(lines), encoding="utf8")
    for name in ("a.jsonl", "a.tsv"):
        data, report = load_triplets(str(tmp_path / name))
        assert data.to_list() == rows
        assert report.rows == 5
    assert "quotes are read as characters" in " ".join(report.lines())
