"""The report: numbers beside the paper's, what is missing, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from e5v_st.mteb_tasks.paper import AVERAGES, PAPER
from e5v_st.mteb_tasks.recording import best, chance, projection
from e5v_st.mteb_tasks.report_page import as_html, thumbnail
from e5v_st.mteb_tasks.report_tables import as_markdown, as_text, label_score, make_rows, missing_tasks
from e5v_st.mteb_tasks.runs import collect

FASHION = {"dress": 0.25, "shirt": 0.35, "toptee": 0.45}


def write_run(folder, name, **tasks):
    """Writes result files as mteb does: task -> subset -> scores."""
    place = folder / name.replace("/", "__") / "abc"
    place.mkdir(parents=True)
    (place / "model_meta.json").write_text(json.dumps({"name": name, "revision": "abc"}))
    for task, subsets in tasks.items():
        scores = [{"hf_subset": subset, "main_score": 0.0, **own} for subset, own in subsets.items()]
        (place / f"{task}.json").write_text(json.dumps({"task_name": task, "scores": {"test": scores}}))
    return folder


@pytest.fixture
def runs(tmp_path):
    details = {
        "examples": [
            {"query": "<q1>", "relevant": ["d2"], "best": [{"id": "d1", "score": 0.9}, {"id": "d2", "score": 0.8}]}
        ],
        "projection": {"query": [[0.0, 0.0], [1.0, 2.0]], "document": [[-1.0, 1.0]], "gap": 0.25},
        "encoding": [{"role": "query", "rows": 10, "seconds": 2.0, "encoded": 4}],
        "hardware": {"device": "a machine"},
    }
    write_run(
        tmp_path,
        "me/one",
        E5VCOCOT2IRetrieval={"default": {"hit_rate_at_1": 0.53, "chance_hit_rate_at_1": 0.0002, "details": details}},
        E5VFashionIQRetrieval={name: {"hit_rate_at_10": value} for name, value in FASHION.items()},
        E5VCIRRRetrieval={"default": {"hit_rate_at_1": 0.3, "recall_subset_at_1": 0.6}},
        E5VCIRRTest={"default": {"hit_rate_at_1": float("nan"), "details": {"submissions": ["cirr_recall.json"]}}},
    )
    write_run(tmp_path, "me/two", E5VCOCOT2IRetrieval={"default": {"hit_rate_at_1": 0.5}})
    return collect([tmp_path])


def rows_by_key(runs):
    return {row.key: row for row in make_rows(runs)}


def test_scores_stand_beside_the_papers_with_the_difference(runs):
    row = rows_by_key(runs)["E5VCOCOT2IRetrieval", "default", "hit_rate_at_1"]
    assert (row.paper, row.values) == (52.0, [53.0, 50.0])
    assert row.chance == pytest.approx(0.02)
    line = next(line for line in as_text(runs).splitlines() if line.startswith("COCOT2IRetrieval  "))
    assert line.split() == ["COCOT2IRetrieval", "R@1", "0.02", "52.00", "53.00", "+1.00", "50.00", "-2.00"]


def test_averages_need_all_their_parts(runs):
    rows = rows_by_key(runs)
    assert rows["E5VFashionIQRetrieval", "average", "hit_rate_at_10"].values == [pytest.approx(35.0), None]
    assert ("E5VSTS", "average", "cosine_spearman") not in rows


def test_the_averages_of_the_papers_numbers_are_the_papers_averages():
    for (task, subset, score), value in PAPER.items():
        if subset == "average":
            parts = [PAPER[(*part, score)] for part in AVERAGES[task]]
            assert np.mean(parts) == pytest.approx(value, abs=0.011)


def test_papers_numbers_are_those_of_the_fact_sheet():
    """Spot checks, copied by hand from the paper's tables."""
    assert PAPER["E5VFlickr30kT2IRetrieval", "default", "hit_rate_at_1"] == 79.5
    assert PAPER["E5VCIRRTest", "default", "hit_rate_at_50"] == 93.54
    assert PAPER["E5VFashionIQRetrieval", "shirt", "hit_rate_at_10"] == 36.36
    assert PAPER["E5VCOCOI2IRetrieval", "i2t", "hit_rate_at_5"] == 76.8
    assert PAPER["E5VSICKR", "default", "cosine_spearman"] == 83.51


def test_scores_that_the_paper_lacks_are_shown_and_unknown_ones_left_open(runs):
    rows = rows_by_key(runs)
    assert rows["E5VCIRRRetrieval", "default", "recall_subset_at_1"].values == [60.0, None]
    assert rows["E5VCIRRTest", "default", "hit_rate_at_1"].values == [None, None]
    assert "cirr_recall.json" in as_text(runs)


def test_what_is_missing_is_said(runs):
    assert "E5VSTS12" in missing_tasks(runs[0])
    assert "E5VCOCOT2IRetrieval" not in missing_tasks(runs[0])
    assert "me/two: no results of" in as_text(runs)


def test_hardware_and_speed_are_said(runs):
    text = as_text(runs)
    assert "device a machine" in text
    assert "10 rows, 4 contents encoded by rank 0 in 2 s, 2.0 a second" in text


def test_markdown_is_one_table(runs):
    lines = [line for line in as_markdown(runs).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {9}
    assert lines[0].startswith("| task | score | chance | paper | me/one |")


@pytest.mark.parametrize(
    ("score", "label"),
    [
        ("hit_rate_at_10", "R@10"),
        ("reference_only_family_hit_rate_at_1", "R@1 within the family, by the reference alone"),
        ("cosine_spearman", "Spearman"),
        ("main_score", "main_score"),
    ],
)
def test_scores_have_names_for_people(score, label):
    assert label_score(score) == label


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """Opens and closes at once."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(runs):
    picture = Image.new("RGB", (400, 200), "red")
    contents = {
        "queries": ([{"id": "<q1>", "text": "a <b>bold</b> caption"}], {"<q1>": 0}),
        "corpus": ([{"id": "d1", "image": picture}, {"id": "d2", "image": picture}], {"d1": 0, "d2": 1}),
    }
    page = as_html(runs, lambda *_: contents)
    links = Links()
    links.feed(page)
    assert links.open == []
    assert links.found
    assert all(link.startswith("data:image/jpeg;base64,") for link in links.found)
    assert "http" not in page
    assert "width=device-width" in page
    assert "a &lt;b&gt;bold&lt;/b&gt; caption" in page
    assert page.index('class="wrong"') < page.index('class="right"')
    assert "✗ 0.900" in page
    assert "✓ 0.800" in page
    assert len(re.findall("<circle", page)) == 3


def test_the_page_works_without_pictures(runs):
    page = as_html(runs, lambda *_: {})
    assert "<img" not in page
    assert "&lt;q1&gt;" in page


def test_thumbnails_are_small():
    assert len(thumbnail(Image.new("RGBA", (3000, 2000)))) < 2000


def test_chance_is_that_of_a_random_order():
    relevant = {"a": {"1": 1}, "b": {"1": 1, "2": 1}}
    found = chance(relevant, 10, (1, 5, 50))
    assert found == {
        "chance_hit_rate_at_1": pytest.approx((0.1 + 0.2) / 2),
        "chance_hit_rate_at_5": pytest.approx((0.5 + (1 - 0.5 * 4 / 9)) / 2),
    }


def test_best_orders_ties_as_pytrec_eval_does():
    import pytrec_eval

    scores = {"b": 0.5, "a": 0.5, "c": 0.5, "d": 0.9}
    order = best(scores, 4)
    assert order[0] == "d"
    for place, name in enumerate(order, start=1):
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {name: 1}}, {"recip_rank"})
        assert evaluator.evaluate({"q": scores})["q"]["recip_rank"] == pytest.approx(1 / place)


def test_the_gap_is_the_distance_of_the_centres():
    rng = np.random.default_rng(0)
    texts, images = rng.normal(size=(500, 6)) + 3, rng.normal(size=(300, 6)) - 3
    found = projection(texts, images)
    centres = [(part / np.linalg.norm(part, axis=1, keepdims=True)).mean(0) for part in (texts, images)]
    assert found["gap"] == pytest.approx(np.linalg.norm(centres[0] - centres[1]))
    assert len(found["query"]) <= 200
    assert len(found["document"]) <= 200
    first = [np.array(found[side])[:, 0] for side in ("query", "document")]
    assert first[0].min() > first[1].max() or first[0].max() < first[1].min()


def test_a_truth_value_is_not_a_score(tmp_path):
    write_run(tmp_path, "me/one", E5VCOCOT2IRetrieval={"default": {"hit_rate_at_1": True, "hit_rate_at_5": 0.5}})
    rows = rows_by_key(collect([tmp_path]))
    assert rows["E5VCOCOT2IRetrieval", "default", "hit_rate_at_1"].values == [None]
    assert rows["E5VCOCOT2IRetrieval", "default", "hit_rate_at_5"].values == [50.0]


BROKEN = {
    "empty.json": "",
    "cut.json": '{"task_name": "E5VSTS12", "scores": {"test": [{"main',
    "list.json": "[1, 2]",
    "number.json": "3",
    "foreign.json": '{"dependencies": {"react": "19"}}',
    "no_task.json": '{"scores": {"test": [{"hf_subset": "default", "main_score": 0.5}]}}',
    "no_subset.json": '{"task_name": "E5VSTS12", "scores": {"test": [{"main_score": 0.5}]}}',
    "no_rows.json": '{"task_name": "E5VSTS12", "scores": {"test": 3}}',
    "words.json": '{"task_name": "E5VSTS12", "scores": {"test": [{"hf_subset": "default", "main_score": "high"}]}}',
    "truth.json": '{"task_name": "E5VSTS12", "scores": {"test": [{"hf_subset": "default", "main_score": true}]}}',
    "no_scores.json": '{"task_name": "E5VSTS12", "scores": {"test": []}}',
    "no_splits.json": '{"task_name": "E5VSTS12", "scores": {}}',
    "details.json": '{"task_name": "A", "scores": {"test": [{"hf_subset": "b", "main_score": 1, "details": []}]}}',
    "bytes.json": "\udcff",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_a_result_is_left_out_and_named(tmp_path, capsys, name):
    from e5v_st.cli import main

    write_run(tmp_path, "me/one", E5VSTS13={"default": {"cosine_spearman": 0.5}})
    file = next(tmp_path.rglob("model_meta.json")).with_name(name)
    file.write_bytes(BROKEN[name].encode(errors="surrogateescape"))
    assert main(["report", str(tmp_path), "--no-pictures"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0].startswith(f"left out {file}: it is not a result file of mteb")
    assert len(printed.err.splitlines()) == 1
    assert re.search(r"STS13 +Spearman +89\.94 +50\.00 +-39\.94", printed.out)
    assert re.search("me/one: no results of .*E5VSTS12", printed.out)


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"name": "a/b"}', '{"name": "a/b", "revision": "1"'])
def test_a_run_that_does_not_say_whose_it_is_is_left_out_and_named(tmp_path, capsys, meta):
    write_run(tmp_path, "me/one", E5VSTS13={"default": {"cosine_spearman": 0.5}})
    write_run(tmp_path, "me/two", E5VSTS13={"default": {"cosine_spearman": 0.75}})
    (tmp_path / "me__two" / "abc" / "model_meta.json").write_text(meta)
    assert [run.name for run in collect([tmp_path])] == ["me/one"]
    assert capsys.readouterr().err.startswith(f"left out {tmp_path / 'me__two' / 'abc'}: model_meta.json is not one of")


def test_folders_with_broken_files_alone_have_no_results(tmp_path, capsys):
    from e5v_st.cli import main

    write_run(tmp_path, "me/one")
    (tmp_path / "me__one" / "abc" / "E5VSTS12.json").write_text("")
    assert main(["report", str(tmp_path)]) == 1
    assert "E5VSTS12.json: it is not a result file" in capsys.readouterr().err


def test_two_revisions_of_a_model_are_told_apart(tmp_path):
    write_run(tmp_path / "a", "me/one", E5VSTS13={"default": {"cosine_spearman": 0.5}})
    write_run(tmp_path / "b", "me/one", E5VSTS13={"default": {"cosine_spearman": 0.25}})
    meta = tmp_path / "b" / "me__one" / "abc" / "model_meta.json"
    meta.write_text('{"name": "me/one", "revision": "0123456789"}')
    head = as_text(collect([tmp_path])).splitlines()[0]
    assert re.split("  +", head)[4:] == ["me/one @0123456", "difference", "me/one @abc", "difference"]


def test_a_folder_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    write_run(tmp_path, "me/one", E5VSTS13={"default": {"cosine_spearman": 0.5}})
    monkeypatch.chdir(tmp_path)
    assert len(collect([tmp_path, tmp_path / "me__one", tmp_path / "a" / "..", tmp_path.joinpath(".")])) == 1


def test_an_experiment_goes_by_a_name_of_its_own(tmp_path):
    write_run(tmp_path, "me/one", E5VSTS13={"default": {"cosine_spearman": 0.5}})
    meta = next(tmp_path.rglob("model_meta.json"))
    meta.write_text('{"name": "me/one", "revision": "1", "experiment_kwargs": {"output_dtypes": "int8"}}')
    assert [run.name for run in collect([tmp_path])] == ["me/one (output_dtypes=int8)"]


def test_the_splits_of_a_task_are_told_apart(tmp_path):
    write_run(tmp_path, "me/one")
    rows = {split: [{"hf_subset": "default", "main_score": score}] for split, score in (("dev", 0.5), ("test", 0.25))}
    file = tmp_path / "me__one" / "abc" / "STSBenchmark.json"
    file.write_text(json.dumps({"task_name": "STSBenchmark", "scores": rows}))
    (run,) = collect([tmp_path])
    assert [run.percent(("STSBenchmark", f"default ({split})", "main_score")) for split in rows] == [50, 25]


@pytest.mark.parametrize("left_out", [*FASHION, None])
def test_an_average_over_fewer_subsets_than_the_papers_is_none(tmp_path, left_out):
    subsets = {name: {"hit_rate_at_10": value} for name, value in FASHION.items() if name != left_out}
    write_run(tmp_path, "me/one", E5VFashionIQRetrieval=subsets)
    (run,) = collect([tmp_path])
    found = run.percent(("E5VFashionIQRetrieval", "average", "hit_rate_at_10"))
    assert found == (pytest.approx(35.0) if left_out is None else None)
    assert (f"E5VFashionIQRetrieval ({left_out})" in as_text([run])) == (left_out is not None)


def test_results_on_other_data_than_the_published_are_said_not_to_be_comparable(tmp_path):
    def details(**rows):
        return {"details": {"encoding": [{"role": role, "rows": n, "seconds": 1.0} for role, n in rows.items()]}}

    whole = {"t2i": details(query=5000, document=1000), "i2t": details(query=1000, document=4990)}
    pairs = {"default": {"details": {"encoding": 2 * details(input=1500)["details"]["encoding"]}}}
    write_run(tmp_path, "me/one", E5VFlickr30kI2IRetrieval=whole, E5VSTS13=pairs, E5VEmojiSTS=pairs)
    lines = [line for line in as_text(collect([tmp_path])).splitlines() if "not comparable" in line]
    assert lines == [
        "me/one: not comparable with the paper: Flickr30kI2IRetrieval i2t has 4990 rows (document), not 5000"
    ]
