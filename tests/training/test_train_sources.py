"""``e5v train`` on several sources with images: what it trains, leaves behind, refuses, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import killing
import pytest
import torch
from safetensors.torch import load_file

import e5v_st
from e5v_st.cli import main as e5v
from e5v_st.training import collate
from e5v_st.training.recipes import read_arguments, read_recipe
from e5v_st.training.resume import last_checkpoint
from e5v_st.training.train_nli import main


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log_history.json").read_text()) if "loss" in entry]


def test_sources_of_texts_images_and_both_train_an_adapter_that_loads(source_recipe, small, tmp_path):
    assert main([source_recipe(lora_dropout=0.0)]) == 0
    run = tmp_path / "run"
    items = ["A dog.", str(tmp_path / "0.png"), {"image": str(tmp_path / "1.png"), "text": "is red"}]
    found = e5v_st.load(small, adapter=run, device="cpu").encode(items)
    assert abs(found - e5v_st.load(small, device="cpu").encode(items)).max() > 1e-3
    card = (run / "README.md").read_text()
    for name in ("texts", "photos", "changes"):
        assert f"{name}.jsonl: 12 rows" in card
    assert "trained on the data below" in card
    again = read_recipe(run / "recipe.yaml")
    assert again["train"][1]["weight"] == 2
    assert (again["loss"]["false_negatives"], again["matryoshka"]) == (0.0, [128, 32])
    assert "data" not in again
    settings, _ = read_arguments([str(run / "recipe.yaml"), "--output_dir", str(tmp_path / "other")])
    assert settings.train == again["train"]


def test_training_on_images_lowers_the_loss_and_finds_them(source_recipe, tmp_path):
    path = source_recipe(
        train=[str(tmp_path / "photos.jsonl")],
        loss={},
        matryoshka=[],
        batch_size=12,
        mini_batch_size=12,
        max_steps=16,
        eval_images=str(tmp_path / "photos.jsonl"),
        eval_steps=100,
        learning_rate="1e-2",
        lora_dropout=0.0,
    )
    rows = [{"image": f"{n}.png", "text": f"Picture {n}."} for n in range(12)]
    (tmp_path / "seen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([path, "--eval_images", str(tmp_path / "seen.jsonl")]) == 0
    found = losses(tmp_path / "run")
    assert sum(found[-4:]) < 0.8 * sum(found[:4])
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["after"]["t2i_recall@1"] > scores["before"]["t2i_recall@1"] + 0.2


def test_stopped_and_continued_it_ends_in_the_same_weights(source_recipe, tmp_path, monkeypatch):
    path = source_recipe(lora_dropout=0.2, batch_sampler="no_duplicates")
    assert main([path, "--output_dir", str(tmp_path / "whole")]) == 0
    batches: list[Any] = []

    def cut_and_stop(*args: Any) -> list[str]:
        batches.append(args)
        if len(batches) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(*args)

    stock = collate.cut_sentences
    monkeypatch.setattr(collate, "cut_sentences", cut_and_stop)
    words = [path, "--output_dir", str(tmp_path / "stopped")]
    assert main(words) == 128 + signal.SIGTERM
    assert 1 <= int(last_checkpoint(tmp_path / "stopped").name.split("-")[1]) < 4
    assert main([*words, "--resume"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


@pytest.mark.slow
def test_killed_at_random_points_and_continued_it_ends_in_the_same_weights(source_recipe, tmp_path):
    path = source_recipe(lora_dropout=0.2, save_steps=1)

    def words(name: str) -> list[str]:
        return [path, "--output_dir", str(tmp_path / name), "--resume"]

    seconds = killing.run(main, words("undisturbed"))
    killed = 0
    for alive in killing.kill_at_random(main, words("killed"), seconds, seed=5):
        killed += alive
        if (tmp_path / "killed" / "adapter_model.safetensors").exists():
            shutil.rmtree(tmp_path / "killed")
    assert killed >= 2
    killing.run(main, words("killed"))
    assert_same(tmp_path / "undisturbed", tmp_path / "killed")


def test_processes_that_read_ahead_change_nothing(source_recipe, tmp_path):
    path = source_recipe(max_steps=2)
    for name, workers in (("none", "0"), ("two", "2")):
        assert main([path, "--output_dir", str(tmp_path / name), "--dataloader_num_workers", workers]) == 0
    assert_same(tmp_path / "none", tmp_path / "two")


def test_a_second_stage_records_base_and_first_stage(source_recipe, tmp_path):
    assert main([source_recipe(train=[str(tmp_path / "texts.jsonl")], loss={}, max_steps=2)]) == 0
    path = source_recipe(init_adapter=str(tmp_path / "run"), output_dir=str(tmp_path / "second"), learning_rate=0.0)
    assert main([path]) == 0
    assert_same(tmp_path / "run", tmp_path / "second")  # at a learning rate of 0
    card = (tmp_path / "second" / "README.md").read_text()
    assert "It goes on from the adapter" in card
    assert "SHA-256" in card
    assert read_recipe(tmp_path / "second" / "recipe.yaml")["init_adapter"] == str(tmp_path / "run")


def test_each_source_may_have_its_own_loss(source_recipe, tmp_path):
    rows = [{"anchor": f"a {n}", "positive_image": f"{n}.png", "score": n / 12} for n in range(12)]
    (tmp_path / "graded.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [str(tmp_path / "texts.jsonl"), {"data": str(tmp_path / "graded.jsonl"), "loss": {"name": "cosent"}}]
    assert main([source_recipe(train=sources, loss={}, max_steps=4)]) == 0
    assert weights(tmp_path / "run")


def test_a_teacher_is_learned_from(source_recipe, tmp_path):
    teacher = {}
    for role in ("anchor", "positive", "negative"):
        teacher[role] = str(tmp_path / role)
        table = str(tmp_path / "texts.jsonl")
        assert e5v(["embed", table, teacher[role], "--model", "e5v-tiny", "--text-column", role]) == 0
    source = {"data": str(tmp_path / "texts.jsonl"), "teacher": teacher}
    more = {"lora_dropout": 0.0, "batch_size": 12, "mini_batch_size": 12, "max_steps": 20, "matryoshka": []}
    assert main([source_recipe(train=[source], loss={"name": "distill", "temperature": 0.05}, **more)]) == 0
    found = losses(tmp_path / "run")
    assert sum(found[-4:]) < 0.7 * sum(found[:4])


def test_the_plan_counts_what_the_training_does(source_recipe, small, tmp_path, capsys, caplog):
    path = source_recipe(max_steps=-1, num_train_epochs=2)
    assert main(["--plan", path]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert main([path]) == 0
    steps = json.loads((tmp_path / "run" / "log_history.json").read_text())[-1]["step"]
    assert f"{steps} steps of 4 rows, {steps // 2} an epoch" in said
    trained = sum(weight.numel() for weight in weights(tmp_path / "run").values())
    assert f"{trained:,} trained weights of" in said
    model = e5v_st.load(small, device="cpu")
    count = model.preprocess([f"Picture {n}." for n in range(12)])["attention_mask"].sum().item() / 12
    assert f"tokens of a row: anchor {count:,.0f}, positive" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "want a list with an entry for each source"),
        ({"train": "texts.jsonl"}, "train='texts.jsonl', want a list"),
        ({"train": [{"data": "texts.jsonl", "weight": 0}]}, "got weight=0"),
        ({"data": "texts.jsonl"}, "got train and data"),
        ({"eval_rows": 3}, "got train and eval_rows"),
        ({"loss": {"name": "mnlr"}}, "got the name 'mnlr'"),
        ({"matryoshka": [500]}, "want numbers from 1 to 128"),
        ({"batch_size": 13}, "texts has 12 rows to train on, less than --batch_size"),
        ({"train_vision": "all"}, "got train_vision='all', want one of none, projector, lora"),
        ({"on_bad_row": "ignore"}, "want one of stop, skip"),
        ({"loss": {"name": "distill"}}, "texts lacks teacher:"),
        ({"released_quirks": True}, "released_quirks repeats the published run"),
        ({"init_adapter": "nowhere/none"}, "nowhere/none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(source_recipe, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([source_recipe(**changes)]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]


def test_a_loss_that_wants_scores_is_refused_for_pairs_of_texts(recipe, capsys):
    assert main([str(recipe(loss={"name": "cosent"}))]) == 1
    assert "the loss cosent wants more than texts" in capsys.readouterr().err


def test_a_named_loss_trains_pairs_of_texts_too(recipe, tmp_path):
    assert main([str(recipe(loss={"name": "gist"}, matryoshka=[128, 16], max_steps=1, lora_dropout=0.0))]) == 0
    assert weights(tmp_path / "run")
