"""Every family is measured as LLaVA-NeXT is: the embeddings are its own, and its entry claims nothing of another."""

from __future__ import annotations

import json
import os
from typing import Any

import families
import mteb
import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from mteb.cli.build_cli import build_cli
from mteb.models.model_implementations import MODEL_REGISTRY
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

import e5v_st
from e5v_st.cli import main
from e5v_st.model.backbone_e5v import BACKBONES
from e5v_st.model_files import licence, sizes
from e5v_st.mteb_tasks import emoji
from e5v_st.mteb_tasks.cir import E5VCIRRTest
from e5v_st.mteb_tasks.encoder import E5VEncoder
from e5v_st.mteb_tasks.models import make_meta
from e5v_st.mteb_tasks.store import Store

#: One family of each kind of sharing that LLaVA-NeXT does not have: a tree, a mask over it, a copied cache.
KINDS = {"tree": "qwen3_vl", "masks": "gemma3", "fork": "qwen3_5"}


def loader(**columns: list[Any]) -> DataLoader:
    data = Dataset.from_dict(columns)
    return DataLoader(data.cast_column("image", ImageFeature()) if "image" in columns else data, batch_size=4)


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40 + 20 * i, 90, 3), dtype=np.uint8)) for i in range(count)]


def test_the_families_here_are_of_each_kind_of_sharing():
    rows = {row.name: row.sharing for row in BACKBONES}
    assert {name: rows[name] for name in KINDS.values()} == {name: kind for kind, name in KINDS.items()}
    assert set(rows.values()) == {*KINDS, "layers"}


@pytest.mark.parametrize("name", KINDS.values())
def test_the_embeddings_of_tasks_are_those_of_each_item_alone(checkpoint, tmp_path, name):
    model = e5v_st.load(checkpoint(name), device="cpu")
    encoder = E5VEncoder(model, store=Store(tmp_path))
    pictures, changes = images(4), ["is red", "is blue", "is longer", "is <image>"]
    roles = mteb.types.PromptType
    how = {"hf_split": "test", "hf_subset": "default", "show_progress_bar": False}
    cirr = {"task_metadata": mteb.get_task("E5VCIRRRetrieval").metadata, **how}
    plain = {"task_metadata": mteb.get_task("E5VCOCOT2IRetrieval").metadata, **how}
    sts = {"task_metadata": mteb.get_task("E5VSTS12").metadata, **how}

    composed = [{"image": image, "text": text} for image, text in zip(pictures, changes, strict=True)]
    queries = encoder.encode(loader(image=pictures, text=changes), prompt_type=roles.query, **cirr)
    gallery = encoder.encode(loader(image=pictures), prompt_type=roles.document, **cirr)
    assert encoder.encoded == 0  # computed beside the queries
    found = {
        "cirr-query": (queries, composed),
        "cirr-gallery": (gallery, pictures),
        "image": (encoder.encode(loader(image=pictures), prompt_type=roles.document, **plain), pictures),
        "text": (encoder.encode(loader(text=changes), prompt_type=roles.query, **plain), changes),
        "sts": (encoder.encode(loader(text=["A dog.", "A cat is there."]), **sts), ["A dog.", "A cat is there."]),
    }
    for prompt, (own, items) in found.items():
        expected = model.encode(items, prompt_name=prompt, batch_size=1)
        assert abs(own - expected).max() <= 2e-5, prompt


@pytest.mark.parametrize("name", KINDS.values())
def test_a_familys_checkpoint_is_measured_from_the_command_line(checkpoint, tmp_path, capsys, name):
    words = ["eval", str(checkpoint(name)), "-t", "E5VEmojiI2TRetrieval", "--device", "cpu", "--no-store"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"local/{name}" in printed
    assert f"family {name}" in printed
    meta = json.loads(next(tmp_path.rglob("model_meta.json")).read_text())
    assert (meta["name"], meta["loader_kwargs"]) == (f"local/{name}", {"path": name, "device": "cpu"})


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS.values())[: 3 if os.environ.get("E5V_NIGHTLY") == "1" else 1])
def test_the_small_benchmark_runs_on_a_familys_checkpoint(checkpoint, tmp_path, name):
    words = ["eval", str(checkpoint(name)), "-b", "E5V(tiny)", "--device", "cpu", "--no-store"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.rglob("E5VEmoji*.json"))) == 5


# ---- both benchmarks, through mteb's own command ----


@pytest.fixture
def run_mteb(checkpoint, tmp_path, monkeypatch):
    """Runs ``mteb run`` on the entry of a family's checkpoint; returns the main scores by the names of tasks."""
    monkeypatch.setenv("E5V_STORE", str(tmp_path / "store"))

    def run(name: str, benchmark: str) -> dict[str, list[float]]:
        meta = make_meta(str(checkpoint(name)))
        monkeypatch.setitem(MODEL_REGISTRY, meta.name, meta)  # as E5V_MODEL does when mteb is imported
        monkeypatch.setattr(E5VCIRRTest, "folder", tmp_path)
        out = tmp_path / name
        args = build_cli().parse_args(["run", "-m", meta.name, "-b", benchmark, "--output-folder", str(out)])
        args.func(args)
        assert {file.parts[-3] for file in out.rglob("E5V*.json")} == {f"local__{name}"}
        found = [json.loads(file.read_text()) for file in out.rglob("E5V*.json")]
        splits = {own["task_name"]: own["scores"].values() for own in found}
        return {task: [each["main_score"] for split in own for each in split] for task, own in splits.items()}

    return run


@pytest.fixture
def few_emoji(monkeypatch):
    """Has the small benchmark read every eightieth row."""
    read, gallery = emoji._read, emoji._gallery

    def thin(data: Dataset) -> Dataset:
        return data.select(range(0, len(data), 80))

    monkeypatch.setattr(emoji, "_read", lambda name: read(name) if name == "emoji" else thin(read(name)))
    monkeypatch.setattr(emoji, "_gallery", lambda split: thin(gallery(split)))


@pytest.mark.parametrize("name", ["smolvlm-instruct", KINDS["masks"], KINDS["fork"]])
def test_mteb_runs_the_small_benchmark_on_a_family_of_each_kind(run_mteb, few_emoji, name):
    scores = run_mteb(name, "E5V(tiny)")
    tasks = mteb.get_benchmark("E5V(tiny)").tasks
    assert set(scores) == {task.metadata.name for task in tasks}
    assert all(np.isfinite(each) for own in scores.values() for each in own)
    assert not any(task.data_loaded for task in tasks)  # what few rows were read is gone


def test_mteb_runs_the_papers_benchmark_on_a_family(run_mteb, local_data):
    scores = run_mteb("smolvlm-instruct", "E5V")
    assert set(scores) == {task.metadata.name for task in mteb.get_benchmark("E5V").tasks}
    assert all(np.isfinite(each) for task, own in scores.items() for each in own if task != "E5VCIRRTest")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("E5V_NIGHTLY") != "1", reason="half a minute for each family")
@pytest.mark.parametrize("benchmark", ["E5V", "E5V(tiny)"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_mteb_runs_both_benchmarks_on_every_family(run_mteb, local_data, name, benchmark):
    scores = run_mteb(name, benchmark)
    assert set(scores) == {task.metadata.name for task in mteb.get_benchmark(benchmark).tasks}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_an_entry_describes_a_familys_checkpoint_and_no_other(checkpoint, name):
    meta = make_meta(str(checkpoint(name)))
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(name))
    table = model.get_input_embeddings().weight
    assert meta.name == f"local/{name}"
    assert (meta.n_embedding_parameters, meta.embed_dim) == (table.numel(), table.shape[1])
    fixed = families.TINY.layers if name == "gemma4" else 0  # a scale of each layer, which is no parameter
    assert meta.n_parameters == sum(weight.numel() for weight in model.parameters()) + fixed
    assert meta.max_tokens == 8192
    assert meta.modalities == ["image", "text"]
    unknown = ("license", "training_datasets", "public_training_code", "public_training_data", "release_date")
    assert [getattr(meta, field) for field in unknown] == [None] * 5


def test_the_licence_of_an_entry_is_that_of_the_models_card(checkpoint, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint("qwen3_vl").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    cases = {
        "license: apache-2.0": ("apache-2.0", "apache-2.0"),
        "license: gemma": ("gemma", "gemma"),
        "license: other\nlicense_link: https://example.org/terms": ("https://example.org/terms",) * 2,
        "license: other\nlicense_link: LICENSE": ("other", None),
        "license: llama3": ("llama3", None),  # mteb has no such licence in its list
        "tags: [e5-v]": (None, None),
        "license: [": (None, None),
    }
    for head, expected in cases.items():
        (folder / "README.md").write_text(f"---\n{head}\n---\n")
        assert (licence([folder]), make_meta(str(folder)).license) == expected, head


def test_the_configuration_of_a_language_model_with_a_part_for_vision_is_read(checkpoint, tmp_path):
    """As Qwen 2 VL's and 2.5 VL's on the hub, which have no part of their own for the language model."""
    config = json.loads((checkpoint("qwen2_5_vl") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config.pop("text_config"), **config}))
    (tmp_path / "model.safetensors").write_bytes((checkpoint("qwen2_5_vl") / "model.safetensors").read_bytes())
    assert sizes([tmp_path])["max_tokens"] == 8192


def test_the_limit_of_an_images_tokens_is_part_of_an_entrys_name_and_of_the_results(checkpoint):
    meta = make_meta(str(checkpoint("smolvlm-instruct")), max_image_tokens=20, store=False)
    assert meta.name == "local/smolvlm-instruct (max_image_tokens=20)"
    assert meta.load_model("cpu").described == {"family": "smolvlm-instruct", "image tokens": "at most 20"}
    usual = make_meta(str(checkpoint("smolvlm-instruct")), store=False).load_model("cpu")
    assert usual.described == {"family": "smolvlm-instruct", "image tokens": "at most 64"}
    assert make_meta("e5v-tiny", store=False).load_model("cpu").described == {"family": "llava_next-llama3"}
