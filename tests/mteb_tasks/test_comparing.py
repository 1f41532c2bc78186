"""Runs beside public numbers: means, verdicts, what is not compared, intervals, and the page that shows them."""

from __future__ import annotations

import json
from math import sqrt

import mteb
import numpy as np
import pytest
from mteb.abstasks.retrieval import AbsTaskRetrieval
from test_report import Links, write_run
from test_tasks import fill, run, unit

from e5v_st.cli import main
from e5v_st.mteb_tasks import upstream
from e5v_st.mteb_tasks.comparing import TOLERANCE, categories, interval, judge, measured, missing_of_mieb
from e5v_st.mteb_tasks.public_scores import (
    BENCHMARKS,
    CATEGORIES,
    E5V,
    find_models,
    mean_of_types,
    public_models,
    public_tasks,
)
from e5v_st.mteb_tasks.report_page import as_html
from e5v_st.mteb_tasks.report_tables import all_remarks, as_markdown, as_text, headlines
from e5v_st.mteb_tasks.runs import collect

PUBLIC = {"prompts": "all=mteb-composed", "normalize": False}


def write(folder, name, settings, tasks, change=lambda task: 0.0):
    """Writes results with E5-V's public scores, changed by some points."""
    results = {}
    for task in tasks:
        known = public_tasks()[task]
        subsets = known.subsets or {"default": known.scores[E5V]}
        results[task] = {name: {"main_score": (score + change(task)) / 100} for name, score in subsets.items()}
    write_run(folder, name, **results)
    meta = folder / name.replace("/", "__") / "abc" / "model_meta.json"
    meta.write_text(json.dumps({"name": name, "revision": "abc", "loader_kwargs": settings}))
    (found,) = (own for own in collect([folder]) if own.name == name)
    return found


def tasks_of(benchmark):
    return [name for name, task in public_tasks().items() if benchmark in task.benchmarks]


def test_public_tasks_are_those_of_the_installed_mteb():
    for benchmark in BENCHMARKS:
        assert set(tasks_of(benchmark)) == {task.metadata.name for task in mteb.get_benchmark(benchmark).tasks}
    for task in public_tasks().values():
        known = mteb.get_task(task.name).metadata
        assert (known.type, known.category, known.main_score) == (task.type, task.category, task.main_score)
    assert {task.type for task in public_tasks().values()} == set(CATEGORIES)


@pytest.mark.parametrize(
    ("benchmark", "model", "expected"),
    [
        ("MIEB(lite)", "royokong/e5-v", 51.9),
        ("MIEB(lite)", "LCO-Embedding/LCO-Embedding-Omni-7B", 68.8),
        ("MIEB(lite)", "Haon-Chen/e5-omni-7B", 65.2),
        ("MIEB(lite)", "voyageai/voyage-multimodal-3", 59.7),
        ("MIEB(lite)", "google/siglip-so400m-patch14-384", 53.5),
        ("MIEB(eng)", "LCO-Embedding/LCO-Embedding-Omni-7B", None),  # not measured on all of it
    ],
)
def test_means_of_types_are_those_of_the_public_leaderboard(benchmark, model, expected):
    """The numbers on the right are the leaderboard's, with one digit."""
    scores = {name: task.scores.get(model) for name, task in public_tasks().items()}
    found = mean_of_types(scores, [public_tasks()[name] for name in tasks_of(benchmark)])
    assert found == (expected and pytest.approx(expected, abs=0.051))


def test_the_score_of_several_subsets_is_their_mean_and_needs_all_of_them(tmp_path):
    found = write(tmp_path, "me/one", {}, ["WITT2IRetrieval", "XM3600T2IRetrieval"])
    for name in ("WITT2IRetrieval", "XM3600T2IRetrieval"):
        assert measured(found, public_tasks()[name]) == pytest.approx(public_tasks()[name].scores[E5V], abs=0.01)
    del found.scores["WITT2IRetrieval", "ar"]
    assert measured(found, public_tasks()["WITT2IRetrieval"]) is None
    assert "WITT2IRetrieval" in missing_of_mieb(found)


def test_categories_are_means_over_the_tasks_that_were_measured_for_every_model(tmp_path):
    """Three of the seven tasks of compositionality in the English benchmark, by hand."""
    names = ["AROCocoOrder", "Winoground", "SugarCrepe"]
    found = write(tmp_path, "me/one", {}, names, lambda task: 3.0 if task == "Winoground" else 0.0)
    models = [E5V, *find_models(["clip-vit"])]
    by_label = {line.label: line for line in categories(found, models)}
    line = by_label["compositionality"]
    assert (line.done, line.count) == (3, 7)
    for model in models:
        expected = np.mean([public_tasks()[name].scores[model] for name in names])
        assert line.public[model] == pytest.approx(expected)
    assert line.difference == pytest.approx(1.0)
    assert [own.difference for own in line.tasks.values()] == [pytest.approx(0), pytest.approx(0), pytest.approx(3)]
    assert not [label for label in by_label if label.startswith("mean of types")]
    text = as_text([found], models)
    assert f"no results of {125 - 3} tasks of MIEB(eng)" in text
    assert "3 of 7" in text
    assert "+3.00" in text


def test_a_complete_benchmark_has_mtebs_mean_of_types(tmp_path):
    found = write(tmp_path, "me/one", PUBLIC, tasks_of("MIEB(lite)"), lambda _: 0.5)
    (line,) = (line for line in categories(found, [E5V]) if line.label.startswith("mean of types"))
    assert (line.label, line.count) == ("mean of types, MIEB(lite)", 51)
    assert line.value == pytest.approx(51.9 + 0.5, abs=0.051)
    assert missing_of_mieb(found) == []


def test_a_run_under_the_public_settings_is_said_to_reproduce_e5v(tmp_path):
    found = write(tmp_path, "me/one", PUBLIC, tasks_of("MIEB(lite)"), lambda _: 0.9)
    verdict = judge(found)
    assert (verdict.state, len(verdict.differences), verdict.left_out.total()) == ("yes", 51, 0)
    (line,) = headlines([found])
    assert line.startswith("✓ me/one reproduces E5-V: 51 of 51 numbers lie within 1 point")


def test_one_task_that_is_far_away_is_named(tmp_path):
    far = {"Winoground": -2.5, "DTD": 1.2}
    found = write(tmp_path, "me/one", PUBLIC, tasks_of("MIEB(lite)"), lambda task: far.get(task, 0.0))
    (line,) = headlines([found])
    assert line == (
        "✗ me/one does not reproduce E5-V: 2 of 51 numbers differ by more than 1 point, most of all Winoground by -2.50"
    )


def test_numbers_that_were_made_in_another_way_are_not_compared_and_the_reason_is_said(tmp_path):
    names = [
        "CIRRIT2IRetrieval",
        "WebQAT2ITRetrieval",
        "DTD",
        "CIFAR10Clustering",
        "VOC2007",
        "ImageCoDe",
        "STL10ZeroShot",
    ]
    cases = {
        "plain": ({}, 2, {"another wording": 2, "not normalised": 3}),
        "fused": ({"prompts": "question=fused"}, 2, {"another wording": 2, "not normalised": 3}),
        "public": (PUBLIC, 7, {}),
        "paper": ({**PUBLIC, "image_layout": "paper"}, 0, {"image layout": 7}),
        "other": ({**PUBLIC, "prompts": "all=mteb-composed,zero-shot=sts"}, 6, {"another prompt": 1}),
    }
    for name, (settings, compared, reasons) in cases.items():
        found = write(tmp_path, f"me/{name}", settings, names, lambda _: 50.0)
        verdict = judge(found)
        assert len(verdict.differences) == compared, name
        told = {part: count for reason, count in verdict.left_out.items() for part in reasons if part in reason}
        assert told == reasons, name
        for count in verdict.left_out.values():
            assert f"{count} numbers are not compared with E5-V's" in " ".join(all_remarks([found]))
    assert judge(found).state == "no"


def test_the_papers_numbers_are_compared_in_the_papers_layout_alone(tmp_path):
    tasks = {
        "E5VFlickr30kT2IRetrieval": {"default": {"hit_rate_at_1": 0.795}},
        "E5VSTS13": {"default": {"cosine_spearman": 0.8994}},
    }
    write_run(tmp_path, "me/one", **tasks)
    (found,) = collect([tmp_path])
    assert list(judge(found).differences) == ["STS13 cosine_spearman"]
    found.settings = {"image_layout": "paper"}
    assert judge(found).state == "yes"
    assert len(judge(found).differences) == 2
    assert judge(found, ["E5VSTS13"]).left_out == {"measured on other data than the published": 1}
    found.scores.clear()
    assert judge(found).state == "unknown"
    assert headlines([found]) == ["– me/one nothing here can be compared with E5-V's numbers"]


def test_independent_runs_of_the_weights_are_within_the_tolerance():
    """MTEB 1.14 with transformers 4.44.2, against the paper, on COCO: its grids are square in both layouts."""
    paper = [52.0, 76.5, 84.7, 62.0, 83.6, 89.7]
    independent = [52.37, 76.93, 85.01, 61.24, 83.46, 89.92]
    assert max(abs(np.subtract(paper, independent))) <= TOLERANCE


@pytest.mark.parametrize(("hits", "queries"), [(300, 1000), (9000, 10000), (5, 50)])
def test_intervals_are_those_of_a_share_of_hits(hits, queries):
    """Near the normal approximation, which is exact enough at these sizes."""
    ranks = [1] * hits + [0] * (queries - hits)
    low, high = interval({"details": {"first_hits": ranks}}, "hit_rate_at_5")
    share = hits / queries
    width = 196 * sqrt(share * (1 - share) / queries)
    assert low == pytest.approx(100 * share - width, abs=width / 4)
    assert high == pytest.approx(100 * share + width, abs=width / 4)


def test_there_is_no_interval_without_the_queries_own_scores():
    assert interval({"main_score": 0.5}, "ndcg_at_10") is None
    assert interval({"details": {"first_hits": [1, 2]}}, "ndcg_at_10") is None
    assert interval({"details": {"first_hits": []}}, "hit_rate_at_1") is None


def test_places_of_first_hits_give_the_hit_rates(given):
    rng = np.random.default_rng(3)
    corpus, queries = [f"d{i:02}" for i in range(60)], [f"q{i:02}" for i in range(40)]
    relevant = {name: {corpus[i]: 1 for i in rng.integers(60, size=2)} for name in queries}
    documents = {**unit(rng, corpus), **dict.fromkeys(corpus[:20], np.float32([1, 0, 0, 0, 0, 0, 0, 0]))}  # ties
    model = given({"query": unit(rng, queries), "document": documents})
    scores = run(fill(mteb.get_task("E5VCOCOT2IRetrieval"), corpus, queries, relevant), model)
    ranks = np.array(scores["details"]["first_hits"])
    assert len(ranks) == 40
    for k in (1, 5, 10):
        assert ((ranks > 0) & (ranks <= k)).mean() == pytest.approx(scores[f"hit_rate_at_{k}"], abs=1e-5)
    assert 0 < scores["hit_rate_at_10"] < 1


@pytest.mark.parametrize(
    "task",
    ["Flickr30kT2IRetrieval", "ImageCoDeT2IRetrieval", "VidoreArxivQARetrieval", "RP2kI2IRetrieval", "CVBenchCount"],
)
def test_mtebs_own_retrieval_tasks_keep_each_querys_main_score(given, monkeypatch, task):
    """Their mean is the main score: ndcg@10, hit rate@3, ndcg@5, hit rate@1 without the first one, accuracy."""
    kind = AbsTaskRetrieval
    monkeypatch.setattr(kind, "task_specific_scores", kind.task_specific_scores)  # put back after the test
    upstream.keep_scores_of_queries()
    upstream.keep_scores_of_queries()  # again changes nothing
    rng = np.random.default_rng(4)
    corpus, queries = [f"d{i:02}" for i in range(60)], [f"q{i:02}" for i in range(30)]
    relevant = {name: {corpus[rng.integers(60)]: 1} for name in queries}
    model = given({"query": unit(rng, queries), "document": unit(rng, corpus)})
    scores = run(fill(mteb.get_task(task), corpus, queries, relevant), model)
    ((name, own),) = scores["details"]["queries"].items()
    assert len(own) == 30
    assert np.mean(own) == pytest.approx(scores[name], abs=2e-5)
    assert scores["main_score"] == scores[name]
    assert interval(scores, name) is not None


def test_scores_of_queries_whose_mean_is_another_are_no_basis_of_an_interval():
    kept = {"details": {"queries": {"ndcg_at_10": [0.0, 1.0, 1.0]}}}
    assert interval({**kept, "ndcg_at_10": 2 / 3}, "ndcg_at_10") is not None
    assert interval({**kept, "ndcg_at_10": 0.5}, "ndcg_at_10") is None


def test_the_page_says_first_whether_the_run_reproduces_e5v(tmp_path):
    far = {"Winoground": -2.5, "DTD": 1.2}
    found = write(tmp_path, "me/one", PUBLIC, tasks_of("MIEB(lite)"), lambda task: far.get(task, 0.25))
    page = as_html([found], lambda *_: {}, [E5V, *find_models(["siglip"])])
    links = Links()
    links.feed(page.replace("<!doctype html>", ""))
    assert (links.open, links.found) == ([], [])
    body = page[page.index("<body>") :]
    assert body.index('class="verdict no"') < body.index("MIEB(lite) by category")
    assert "does not reproduce E5-V: 2 of 51 numbers" in body
    assert '<span class="below">-2.50</span>' in body
    assert '<span class="above">+1.20</span>' in body
    assert '<span class="near">+0.25</span>' in body
    assert body.count("<details") == len(CATEGORIES) + 1
    assert "siglip-so400m-patch14-384" in body
    markdown = as_markdown([found])
    assert markdown.splitlines()[2].startswith("**✗ me/one does not reproduce E5-V")
    assert "commit f4cc6c8b" in page
    assert "commit f4cc6c8b" in markdown


def test_other_models_are_chosen_by_a_part_of_their_names(tmp_path, capsys):
    write(tmp_path, "me/one", PUBLIC, ["DTD"])
    assert main(["report", str(tmp_path), "--no-pictures", "--beside", "voyage", "CLIP-vit"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("✓ me/one reproduces E5-V: 1 of 1 numbers")
    assert "voyage-multimodal-3  clip-vit-large-patch14" in printed
    assert main(["report", str(tmp_path), "--no-pictures", "--beside", "gpt"]) == 1
    assert "got 'gpt', want one of the models with public scores: royokong/e5-v" in capsys.readouterr().err
    assert find_models(["e5-v"]) == [public_models()[0]] == [E5V]
