"""The plan of an evaluation against what a run really embeds, and against the benchmark of its speed, scaled up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mteb
import numpy as np
import pytest
from datasets import load_from_disk

from e5v_st.cli import main
from e5v_st.costs import find_counter
from e5v_st.model.prompts_e5v import PROMPTS
from e5v_st.mteb_tasks import plan as planning
from e5v_st.mteb_tasks.encoder import E5VEncoder, load_encoder
from e5v_st.mteb_tasks.models import make_meta
from e5v_st.mteb_tasks.plan import groups_of, parts_of, plan
from e5v_st.mteb_tasks.store import Store, entry_name

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Counting(E5VEncoder):
    """Counts the tokens of each different content that a task asks for, and embeds nothing."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = {}
        self.per_task = {}

    def encode(self, inputs, *, task_metadata, **others):
        self.current = self.per_task.setdefault(task_metadata.name, {})
        return super().encode(inputs, task_metadata=task_metadata, **others)

    def _sum_states(self, rows, bar):
        number = 0
        for contents, _ in rows:
            number += 1
            self.current.update({content.key(b""): content for content in contents})
        dice = np.random.default_rng(number)
        return dice.normal(size=(number, self.width)).astype(np.float32)

    def tokens(self, task):
        """Counts as the model's own preprocessing does."""
        contents = list(self.per_task[task].values())
        found = 0
        for start in range(0, len(contents), 256):
            part = contents[start : start + 256]
            for prompt in {content.prompt for content in part}:
                items = [content.item() for content in part if content.prompt == prompt]
                found += int(self.model[0].preprocess(items, prompt=prompt)["attention_mask"].sum())
        return found


@pytest.fixture(scope="module")
def counting():
    return Counting(load_encoder("e5v-tiny", device="cpu", store=False).model)


#: The composed task has a thousand images, and runs nightly.
COUNTED = ["E5VEmojiI2TRetrieval", "E5VEmojiSTS", "E5VEmojiComposedRetrieval"]


@pytest.mark.parametrize("task", COUNTED[: 3 if os.environ.get("E5V_NIGHTLY") == "1" else 2])
def test_planned_tokens_are_those_that_a_run_asks_for(counting, task):
    own = mteb.get_task(task)
    own.load_data()
    own.evaluate(counting, "test", encode_kwargs={"show_progress_bar": False})
    counted, contents = counting.tokens(task), len(counting.per_task[task])
    (line,) = plan([mteb.get_task(task)], find_counter("e5v-tiny"))
    assert line.whole.tokens == pytest.approx(counted, rel=0.1)
    assert line.whole.items == pytest.approx(contents, rel=0.1)


def test_the_papers_plan_agrees_with_the_speed_benchmarks_counts_scaled_up(tmp_path, llama3, monkeypatch):
    """Mean tokens of the benchmark's own images and texts, times the published numbers of each, by hand."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import mteb_speed
    from transformers import LlavaNextConfig

    from e5v_st.model.llava_next_e5v import count_tokens
    from e5v_st.model.prompts_e5v import render

    mteb_speed.write_data(tmp_path)

    def texts(prompt, found):
        return np.mean([len(llama3(render(PROMPTS[prompt], "llama3", text)).input_ids) for text in found])

    def images(layout, data, column):
        return [count_tokens(image.height, image.width, LlavaNextConfig(), layout) for image in data[column]]

    def mean(prompt, layout, data, column, changes=("",)):
        empty = texts(prompt, changes) - 1  # the image's own token is one of them
        return np.mean(images(layout, data, column)) + empty

    def data(name):
        return load_from_disk(str(tmp_path / "royokong" / name))

    for layout in ("upstream", "paper"):
        card = count_tokens(400, 800, LlavaNextConfig(), layout) + texts("image", [""]) - 1
        expected = 0.0
        for name, pictures, captions in (("flickr30k_test", 1000, 5000), ("coco_test", 5000, 25000)):
            lines = [text for row in data(name)["text"] for text in row]
            expected += pictures * mean("image", layout, data(name), "image")
            expected += captions * (texts("text", lines) + card)
        asked, shown = data("fashioniq_val"), data("fashioniq_val_imgs")
        both = [", ".join(own) for own in asked["caption"]]
        expected += 2 * 6016 * mean("fashioniq-dress-query", layout, asked, "candidate", both)
        expected += 15536 * mean("fashioniq-dress-gallery", layout, shown, "img")
        asked, shown = data("cirr_val"), data("cirr_imgs")
        expected += (4181 + 4148) * mean("cirr-query", layout, asked, "candidate", asked["caption"])
        expected += (2297 + 2316) * mean("cirr-gallery", layout, shown, "img")
        lines = plan(mteb.get_benchmark("E5V").tasks, find_counter("royokong/e5-v", image_layout=layout))
        found = sum(line.left.tokens for line in lines if "STS" not in line.task and "SICK" not in line.task)
        assert found == pytest.approx(expected, rel=0.1), layout
        cards = next(line for line in lines if line.task == "E5VCOCOI2IRetrieval")
        assert cards.left.tokens == pytest.approx(25000 * card, rel=0.01)


def test_tasks_that_read_the_same_data_share_it():
    counter = find_counter("royokong/e5-v")
    names = ["CIFAR10", "CIFAR10ZeroShot", "CIFAR10Clustering", "CVBenchCount", "CVBenchDepth"]
    lines = {line.task: line for line in plan(mteb.get_tasks(tasks=names), counter)}
    assert lines["CIFAR10ZeroShot"].left.images == lines["CIFAR10Clustering"].left.images == 0
    assert lines["CIFAR10ZeroShot"].left.texts == 10
    # 10,000 test images, and of 5,000 training images of each class about 8 in each of 10 experiments
    assert lines["CIFAR10"].whole.images == pytest.approx(10_000 + 10 * 80, rel=0.01)
    assert lines["CVBenchDepth"].shared.tokens == 0  # the same dataset, but other rows of it


def test_images_that_all_languages_share_count_once():
    (line,) = plan([mteb.get_task("XM3600T2IRetrieval")], find_counter("royokong/e5-v"))
    assert (line.whole.images, line.left.images) == (36 * 3600, 3600)


@pytest.mark.parametrize(
    "benchmark", ["MIEB(Multilingual)", "ViDoRe(v2)", "ViDoRe(v3)", "ViDoRe(v3.1)", "MTEB(eng, v2)"]
)
def test_every_task_has_a_plan(benchmark):
    counter = find_counter("royokong/e5-v")
    tasks = list(parts_of(mteb.get_benchmark(benchmark).tasks))
    lines = plan(tasks, counter)
    assert [line.task for line in lines] == [task.metadata.name for task in tasks]
    assert not [line.task for line in lines if line.whole.tokens <= 0 or line.left.tokens < -1e-3]


def test_a_chosen_prompt_is_the_one_that_is_counted():
    task = mteb.get_task("OVENIT2TRetrieval")
    prompts = {group.holds: group.prompt for group in groups_of(task, "question=fused")}
    assert prompts == {"composed": PROMPTS["fused"], "text": PROMPTS["text"]}


def test_a_plan_loads_nothing_and_knows_what_the_store_has(tmp_path, capsys, monkeypatch):
    task = "E5VEmojiSTS"
    words = ["eval", "e5v-tiny", "-t", task, "--device", "cpu", "--store", str(tmp_path / "store")]

    def line():
        assert main([*words, "--plan", "--rate", "100"]) == 0
        printed = capsys.readouterr().out
        assert "time at 100 tokens a second" in printed
        return next(line for line in printed.splitlines() if line.startswith(task))

    with monkeypatch.context() as patch:
        patch.setattr(mteb, "evaluate", None)
        patch.setattr("e5v_st.loading.load", None)
        assert "100 %" not in line()
        assert list(tmp_path.iterdir()) == []
    assert main([*words, "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    assert line().split()[-4:] == ["100", "%", "0", "0"] or "100 %" in line()
    store = Store(tmp_path / "store")
    (label,) = store.passes(
        f"e5v/e5v-tiny@{json.loads(next(tmp_path.rglob('model_meta.json')).read_text())['revision']}"
    )
    assert label == (task, "test", "default", "", "text")
    assert store.passes("e5v/e5v-tiny@other") == []


@pytest.mark.parametrize("name", ["E5VFlickr30kI2TRetrieval", "E5VFlickr30kI2IRetrieval", "E5VCIRRRetrieval"])
def test_passes_of_the_papers_tasks_are_those_that_a_plan_expects(counting, local_data, tmp_path, name):
    noting = Counting(counting.model)
    noting.store, noting.mteb_model_meta = Store(tmp_path), make_meta("e5v-tiny")
    task = mteb.get_task(name)
    task.load_data()
    task.evaluate(noting, task.eval_splits[0], encode_kwargs={"show_progress_bar": False})
    noted = noting.store.passes(entry_name(noting.mteb_model_meta))
    assert set(noted) == {group.label for group in groups_of(task)}


def test_a_plan_measures_the_rate_where_none_is_given(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "measure", lambda *how: asked.append(how) or 1e9)
    assert main(["eval", "e5v-tiny", "-t", "E5VEmojiSTS", "--plan", "--no-store", "--device", "cpu"]) == 0
    assert [how[1:] for how in asked] == [("cpu", None)]
    assert "time at 1 G operations a second" in capsys.readouterr().out


def test_reading_a_plan_needs_no_torch_weights_of_the_published_model(capsys):
    """E5-V's own numbers are known without its files."""
    assert main(["eval", "e5v", "-b", "E5V", "--plan", "--rate", "4000", "--no-store"]) == 0
    printed = capsys.readouterr().out
    assert "royokong/e5-v (llava_next-llama3, image layout upstream)" in printed
    assert "16 tasks" in printed
