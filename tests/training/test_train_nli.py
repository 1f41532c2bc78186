"""The script as it is called: what it leaves behind, and how it stops, goes on and fails."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import killing
import many_runs
import pytest
import torch
from safetensors.torch import load_file

import e5v_st
from e5v_st.training import resume
from e5v_st.training.examples import load_triplets
from e5v_st.training.recipes import read_arguments, read_recipe
from e5v_st.training.resume import last_checkpoint
from e5v_st.training.train_nli import main
from e5v_st.training.trainer import make_trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log_history.json").read_text()) if "loss" in entry]


def test_help_is_there_before_torch_is():
    heavy = "{'torch', 'transformers', 'datasets'} & set(sys.modules)"
    code = f"""
import contextlib, sys
from e5v_st.training.train_nli import main
with contextlib.suppress(SystemExit):
    main(["--help"])
print({heavy})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--mini_batch_size" in found.stdout
    assert found.stdout.startswith("usage: e5v train [RECIPE]")
    assert found.stdout.splitlines()[-1] == "set()"


def test_a_trained_adapter_loads_by_its_directory_on_the_whole_base(recipe, small, tmp_path, goldens):
    from sentence_transformers import SentenceTransformer

    assert main([str(recipe())]) == 0
    run = tmp_path / "run"
    items = ["A dog.", {"text": "Two men play chess."}, str(goldens / "images/small/02_64x64.png")]
    found = SentenceTransformer(str(run), trust_remote_code=True, device="cpu")
    assert type(found[0]).__name__ == "E5VTransformer"
    embeddings = found.encode(items)
    same = e5v_st.load(small, adapter=run, device="cpu").encode(items)
    assert abs(embeddings - same).max() < 1e-6
    assert abs(embeddings - e5v_st.load(small, device="cpu").encode(items)).max() > 1e-3
    assert sorted(path.name for path in run.glob("*.bin")) == []
    assert not list(run.glob(".saving*"))


def test_the_run_directory_tells_how_it_came_about(recipe, tmp_path, small):
    assert main([str(recipe(eval_rows=8, max_steps=2))]) == 0
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    head = read_recipe_head(card)
    assert {"sentence-transformers", "e5-v", "peft"} <= set(head["tags"])
    assert "base_model" not in head  # it has no hub id
    scores = json.loads((run / "evaluation.json").read_text())
    for when in ("before", "after"):
        assert f"{scores[when]['triplets_cosine_accuracy']:.4f}" in card
    assert "40 rows of anchor, positive, negative" in card
    assert "![loss](loss.png)" in card
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    again = read_recipe(run / "recipe.yaml")
    assert (again["batch_size"], again["learning_rate"], again["max_steps"]) == (8, 4e-3, 2)
    read_arguments([str(run / "recipe.yaml"), "--output_dir", str(tmp_path / "other")])


def read_recipe_head(card: str) -> dict:
    import yaml

    return yaml.safe_load(card.split("---\n")[1])


def test_training_lowers_the_loss(recipe, tmp_path):
    assert main([str(recipe(max_steps=20, save_steps=20))]) == 0
    found = losses(tmp_path / "run")
    assert sum(found[-4:]) < 0.7 * sum(found[:4])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(recipe, tmp_path, monkeypatch, number):
    one, other = tmp_path / "whole", tmp_path / "stopped"
    # With dropout and in-batch order from random numbers, the same weights need the same random state
    path = str(recipe(save_steps=100, lora_dropout=0.2, mini_batch_size=4))
    assert main([path, "--output_dir", str(one)]) == 0

    from e5v_st.training import collate

    batches = []

    def cut_and_kill(*args):
        batches.append(args)
        if len(batches) == 5:  # three columns a batch: in the second step
            os.kill(os.getpid(), number)
        return stock(*args)

    stock = collate.cut_sentences
    monkeypatch.setattr(collate, "cut_sentences", cut_and_kill)
    assert main([path, "--output_dir", str(other)]) == 128 + number
    step = int(last_checkpoint(other).name.split("-")[1])
    assert 1 <= step < 4
    assert not (other / "adapter_model.safetensors").exists()
    assert main([path, "--output_dir", str(other)]) == 1  # not without --resume
    assert main([path, "--output_dir", str(other), "--resume"]) == 0
    assert difference(one, other) == 0
    assert losses(one) == losses(other)


def test_a_run_that_is_complete_and_resumed_trains_no_further(recipe, tmp_path):
    # 4 of the 5 steps of an epoch, at a learning rate that a further step would show at
    path = str(recipe(lr_scheduler_type="constant"))
    assert main([path]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()  # as where it was killed before it was written
    assert main([path, "--resume"]) == 0
    assert difference(tmp_path / "first", tmp_path / "run") == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "run")


def final_files(folder: Path) -> dict[str, bytes]:
    """What a run leaves, but for the checkpoints, and for what tells the time that it took."""
    files = [path for path in folder.iterdir() if path.is_file()]
    timed = ("log_history.json", "README.md", "loss.png", "recipe.yaml")
    return {path.name: b"" if path.name in timed else path.read_bytes() for path in files}


@pytest.mark.slow
def test_killed_at_random_points_and_continued_it_ends_in_the_same_weights(recipe, tmp_path):
    path = str(recipe(lora_dropout=0.2, mini_batch_size=4, save_total_limit=2))

    def words(name):
        return [path, "--output_dir", str(tmp_path / name), "--resume"]

    seconds = killing.run(main, words("undisturbed"))
    killed = 0
    for alive in killing.kill_at_random(main, words("killed"), seconds, seed=3):
        killed += alive
        if not alive:
            shutil.rmtree(tmp_path / "killed")
    assert killed >= 2
    killing.run(main, words("killed"))
    assert difference(tmp_path / "undisturbed", tmp_path / "killed") == 0
    assert losses(tmp_path / "undisturbed") == losses(tmp_path / "killed")
    assert final_files(tmp_path / "undisturbed") == final_files(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".saving*"))


def write_half_a_state_and_die(self, json_path):
    Path(json_path).write_text('{"best_global_step": null, "epoch": ')
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_the_weights_and_die(tensors, filename, *args, **kwargs):
    Path(filename).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(words):
    """Runs the script, and kills it while it writes its third checkpoint."""
    target, replacement = DEATHS[words.pop(0)]
    module, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(module)
    stock, calls = getattr(owner, name), []

    def third(*args, **kwargs):
        calls.append(args)
        return (replacement if len(calls) == 3 else stock)(*args, **kwargs)

    setattr(owner, name, third)
    return main(words)


DEATHS = {
    "the state": ("transformers.trainer_callback.TrainerState.save_to_json", write_half_a_state_and_die),
    "the optimizer": ("torch.save", lambda content, file: write_half_the_weights_and_die(content, file)),
}


@pytest.mark.parametrize("death", DEATHS)
def test_killed_in_the_middle_of_a_checkpoint_it_goes_on_from_the_one_before(recipe, tmp_path, death):
    path = str(recipe(lora_dropout=0.2))
    killing.run(main, [path, "--output_dir", str(tmp_path / "whole")])
    words = [path, "--output_dir", str(tmp_path / "killed"), "--resume"]
    process = killing.start(die_in, [death, *words])
    process.join()
    assert process.exitcode == -signal.SIGKILL
    killing.run(main, words)
    assert difference(tmp_path / "whole", tmp_path / "killed") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


@pytest.mark.parametrize("size", [2000, 150_000], ids=["the first file", "the optimizer"])
def test_a_disk_that_fills_up_is_one_clear_line_and_the_next_run_completes(recipe, tmp_path, capsys, size):
    path = str(recipe(max_steps=2))
    assert main([path, "--output_dir", str(tmp_path / "whole")]) == 0
    words = [path, "--output_dir", str(tmp_path / "full"), "--resume"]
    capsys.readouterr()
    with killing.full_disk(size):
        assert main(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"e5v train: cannot write {tmp_path / 'full' / 'checkpoint-1'}: ")
    assert error.endswith("--resume continues from the last checkpoint")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["evaluation.json"]
    assert main(words) == 0
    assert difference(tmp_path / "whole", tmp_path / "full") == 0


@pytest.fixture
def captioned(tmp_path, goldens) -> Path:
    """A table of images and texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((goldens / "images/small").glob("*.png"))
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}, "text": file.stem} for file in files]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


@pytest.fixture
def graded(tmp_path) -> Path:
    """A table of pairs of texts with scores."""
    rows = [{"sentence1": f"A dog {i}.", "sentence2": f"{i * i} cats.", "score": i / 9} for i in range(9)]
    (tmp_path / "graded.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "graded.jsonl"


def test_two_processes_train_as_one_with_the_whole_batch_whatever_is_measured(
    recipe, source_recipe, small, tmp_path, goldens, captioned, graded
):
    # Not Adam, whose first steps have one size however small the gradient, so that rounding decides their direction
    path = str(recipe(lora_dropout=0.0, save_steps=100, optim="sgd", learning_rate=0.1, max_steps=3))
    often = ["--eval_steps", "2"]
    measured = {
        "nothing": [],
        "graded pairs": ["--eval_sts", str(graded), *often],
        "triplets": ["--eval_data", str(tmp_path / "triplets.jsonl"), *often],
        "images": ["--eval_images", str(captioned), *often],
    }
    pictures = sorted(map(str, (goldens / "images/small").glob("*.png")))
    runs = [["train_texts", path, "--output_dir", str(tmp_path / name), *flags] for name, flags in measured.items()]
    runs.append(["train_images", str(small), pictures, str(tmp_path / "batches of images"), True])
    sources = source_recipe(lora_dropout=0.0, optim="sgd", learning_rate=0.1, mini_batch_size=1)
    runs.append(["train_texts", sources, "--output_dir", str(tmp_path / "sources")])
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    found = subprocess.run(
        [*launch, "--master_port", "0", "--standalone", many_runs.__file__, str(tmp_path / "runs.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert found.returncode == 0, found.stderr[-3000:]

    assert main([path, "--output_dir", str(tmp_path / "one process")]) == 0
    for name in measured:
        assert losses(tmp_path / "one process") == pytest.approx(losses(tmp_path / name), rel=1e-5), name
        assert difference(tmp_path / "one process", tmp_path / name) < 1e-5, name
    assert main([sources, "--output_dir", str(tmp_path / "one process, sources")]) == 0
    assert losses(tmp_path / "one process, sources") == pytest.approx(losses(tmp_path / "sources"), rel=1e-5)
    assert difference(tmp_path / "one process, sources", tmp_path / "sources") < 1e-5
    many_runs.train_images(str(small), pictures, str(tmp_path / "one process, images"), cached=False)
    assert difference(tmp_path / "one process, images", tmp_path / "batches of images") < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_one_writes_a_checkpoint(recipe, tmp_path, monkeypatch, rank):
    # Two that write the same files at once read each other's halves
    trainer = make_trainer(*read_arguments([str(recipe())]), load_triplets(str(tmp_path / "triplets.jsonl"))[0])
    monkeypatch.setattr(type(trainer.args), "process_index", rank)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved").exists() == (rank == 0)


def test_gradient_caching_and_activation_checkpointing_change_nothing(recipe, tmp_path):
    path = str(recipe(lora_dropout=0.0, save_steps=100, optim="sgd"))
    assert main([path, "--output_dir", str(tmp_path / "plain")]) == 0
    flags = ["--mini_batch_size", "3", "--gradient_checkpointing"]
    assert main([path, "--output_dir", str(tmp_path / "cached"), *flags]) == 0
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "cached"), rel=1e-5)
    assert difference(tmp_path / "plain", tmp_path / "cached") < 1e-5


def test_the_effect_on_images_is_measured_where_there_are_images(recipe, tmp_path, captioned):
    assert main([str(recipe(eval_images=str(captioned), max_steps=1))]) == 0
    scores = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert set(scores["after"]) == {"t2i_recall@1", "t2i_recall@5"}


def test_it_stops_early_and_keeps_the_best(recipe, tmp_path, monkeypatch):
    from transformers import trainer_callback

    warnings: list[str] = []
    monkeypatch.setattr(trainer_callback.logger, "warning", warnings.append)
    # With a learning rate of 0 no evaluation is better than the first
    flags = ["--early_stop", "2", "--eval_rows", "8", "--learning_rate", "0", "--max_steps", "9", "--save_steps", "1"]
    assert main([str(recipe()), *flags]) == 0
    assert len(losses(tmp_path / "run")) == 3
    assert warnings == []  # not: "early stopping is disabled"


@pytest.mark.parametrize("stop", [[], ["--early_stop", "2"]], ids=["to the end", "early stopping"])
def test_a_training_that_diverges_ends_at_the_next_evaluation(recipe, tmp_path, captioned, capsys, stop):
    flags = ["--eval_images", str(captioned), "--optim", "sgd", "--learning_rate", "1e30", "--max_steps", "9"]
    assert main([str(recipe()), *flags, *stop]) == 1
    assert "embeddings are not finite" in capsys.readouterr().err.splitlines()[-1]
    scores = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert list(scores) == ["before"]


def test_what_is_measured_before_training_leaves_the_model_to_the_trainer(recipe, monkeypatch):
    from e5v_st.training.trainer import Trainer

    # What accelerate has prepared already, training does not wrap: for DDP, FSDP or DeepSpeed
    prepared, train = [], Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda self, **how: prepared.append(self.accelerator._models[:]) or train(self, **how)
    )
    assert main([str(recipe(eval_rows=8, max_steps=1))]) == 0
    assert prepared == [[]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "no/such/model"], "no/such/model"),
        (["--data", "none.csv"], "there is no file none.csv"),
        (["--batch_size", "99"], "has 40 rows to train on, less than --batch_size"),
        (["--bits", "7"], "want 4, 8, 16 or 32"),
        (["--per_device_train_batch_size", "4"], "give --batch_size"),
        (["--early_stop", "3"], "something to measure"),
        (["--fsdp", "--eval_rows", "8"], "got --eval_rows with --fsdp"),
    ],
)
def test_wrong_arguments_end_it_before_the_first_step(recipe, capsys, flags, message):
    assert main([str(recipe()), *flags]) == 1
    assert message in capsys.readouterr().err


def test_what_is_wrong_with_held_out_triplets_is_told_too(recipe, tmp_path, caplog):
    (tmp_path / "held.csv").write_text("anchor,positive,negative,id\na,b,c,1\na,,c,2\n")
    assert main([str(recipe()), "--eval_data", str(tmp_path / "held.csv"), "--batch_size", "99"]) == 1
    assert caplog.messages[-2:] == [
        "columns that are not used: id",
        "1 rows with an empty text are left out: line 3",
    ]


def test_a_misspelt_name_in_a_recipe_is_an_error(recipe, capsys):
    assert main([str(recipe(lerning_rate=1))]) == 1
    assert "lerning_rate" in capsys.readouterr().err


def test_an_output_directory_that_cannot_be_written_is_an_error_before_anything_is_loaded(recipe, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main([str(recipe()), "--model", "none", "--output_dir", str(tmp_path / "file" / "run")]) == 1
    assert "cannot write to the output directory" in capsys.readouterr().err


def test_a_full_disk_is_an_error_before_the_first_step(recipe, capsys, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: usage)
    assert main([str(recipe())]) == 1
    assert "free some, or keep fewer" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
