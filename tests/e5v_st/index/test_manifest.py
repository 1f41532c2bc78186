"""What an index knows of the model that made it, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import HubServer
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from e5v_st import fingerprint
from e5v_st.cli import main
from e5v_st.index import manifest as manifests
from e5v_st.index.manifest import find_dtype
from e5v_st.provenance import find_origin
from e5v_st.published import TINY

MODEL = "model.safetensors"


@pytest.fixture
def job(small, pictures, tmp_path, monkeypatch):
    """A folder with a copy of the model, images and an index of them; the working directory."""
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(pictures[:3]):
        shutil.copy(picture, tmp_path / "images" / f"{number}.png")
    shutil.copytree(small, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert embed() == 0
    return tmp_path


def embed(*more, model="model", out="index"):
    return main(["embed", "images", out, "--model", str(model), "--device", "cpu", *more])


def search(*more, index="index"):
    return main(["search", str(index), "red", "--device", "cpu", *more])


def manifest(index="index"):
    with open(f"{index}/_manifest.json") as file:
        return json.load(file)


def change_one_number(file):
    """Another embedding of one rare token; size and time of change stay."""
    before = file.stat()
    weights = load_file(file)
    weights["language_model.model.embed_tokens.weight"][777, 7] += 1
    save_file(weights, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def change_a_setting(file):
    settings = json.loads(file.read_text())
    settings["vision_feature_layer"] = -1
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        (MODEL, change_one_number, "weights"),
        ("config.json", change_a_setting, "configuration, tokenizer or image processor"),
        ("tokenizer.json", lambda file: file.write_text(file.read_text() + " "), "configuration, tokenizer"),
        ("sentence_bert_config.json", lambda file: file.write_text("{}"), "configuration, tokenizer"),
    ],
)
def test_a_model_that_changed_under_the_same_name_is_refused(job, file, change, what, capsys):
    change(job / "model" / file)
    for command, start in (("embed", embed), ("search", search)):
        assert start() == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"e5v {command}: --model {job / 'model'} does not have the {what}")
        assert error.endswith("has changed since then: put the old files back, or embed into a new folder")


def test_an_adapter_that_changed_under_the_same_name_is_refused(job, goldens, capsys):
    shutil.copytree(goldens / "legacy_adapter", "adapter")
    assert embed("--adapter", "adapter", out="with") == 0
    assert search(index="with") == 0
    weights = load_file("adapter/adapter_model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, "adapter/adapter_model.safetensors")
    capsys.readouterr()
    for start in (lambda: embed("--adapter", "adapter", out="with"), lambda: search(index="with")):
        assert start() == 1
        assert "does not have the adapter of with, which has changed since then" in capsys.readouterr().err
    for start in (lambda: embed("--adapter", "adapter"), lambda: search("--adapter", "adapter")):
        assert start() == 1
        assert f"does not have the adapter of index, which was made with --model {job}" in capsys.readouterr().err


def test_other_code_is_refused_and_its_version_is_named(job, monkeypatch, capsys):
    monkeypatch.setattr(manifests, "digest_code", lambda: "other")
    monkeypatch.setattr(manifests, "__version__", "9.9")
    for start in (embed, search):
        assert start() == 1
        assert "made by other code (e5v-st 0.1.0, this is 9.9)" in capsys.readouterr().err


def test_the_digests_are_those_of_sha256sum(job):
    def run(*files):
        lines = subprocess.run(["sha256sum", *files], cwd=job / "model", capture_output=True, check=True).stdout
        return subprocess.run(["sha256sum"], input=lines, capture_output=True, check=True).stdout.decode().split()[0]

    settings = ("config.json", "preprocessor_config.json", "special_tokens_map.json", "tokenizer.json")
    assert manifest()["weights_sha256"] == run(MODEL)
    assert manifest()["settings_sha256"] == run(*settings, "tokenizer_config.json")


def test_every_weights_file_of_a_sharded_model_counts(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors", "other.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = fingerprint.digest_weights(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"not of this model")
    assert fingerprint.digest_weights(tmp_path) == before
    (tmp_path / "model-2.safetensors").write_bytes(b"changed")
    assert fingerprint.digest_weights(tmp_path) != before


def test_the_digest_of_the_code_is_of_all_files_that_travel_and_of_what_loads():
    folder = TINY.parent
    for pattern in fingerprint.CODE:
        assert list(folder.glob(pattern)), pattern


@pytest.mark.parametrize("moved", [False, True], ids=["stays", "moves with its model"])
def test_a_relative_model_is_found_from_any_working_directory(job, moved, monkeypatch, capsys):
    assert manifest()["model"] == "../model"
    if moved:
        (job / "elsewhere").mkdir()
        for name in ("index", "model", "images"):
            shutil.move(job / name, job / "elsewhere" / name)
    monkeypatch.chdir("/")
    assert search(index=job / ("elsewhere/index" if moved else "index")) == 0
    assert "0.png" in capsys.readouterr().out


def test_a_model_that_moved_alone_is_named_and_checked(job, small, capsys):
    shutil.move("model", "moved")
    assert search() == 1
    assert f"the model of index is no longer in {job / 'model'}: say with --model where" in capsys.readouterr().err
    assert search("--model", "moved") == 0
    change_one_number(job / "moved" / MODEL)
    assert search("--model", "moved") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--model {job / 'moved'} does not have the weights of index" in error
    assert f"was made with --model {job / 'model'}: name that" in error
    assert search("--model", str(small)) == 0


def test_the_same_model_by_another_spelling_is_the_same_job(job, monkeypatch, capsys):
    (job / "link").symlink_to("model")
    shutil.copytree("model", "copy")
    monkeypatch.setenv("HOME", str(job))
    for spelling in ("./model/", job / "model", "link", "copy", "images/../model", "~/model"):
        assert embed(model=spelling) == 0
    assert main(["embed", "images", "index", "--model=~/model", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("1 done already") == 7
    assert find_origin(str(TINY)) == find_origin("e5v-tiny") == find_origin(TINY)


def test_the_dtype_that_was_used_is_recorded_and_used_again(small, job, monkeypatch, capsys):
    assert manifest()["dtype"] == "float32"
    assert embed("--dtype", "bfloat16", out="half") == 0
    assert manifest("half")["dtype"] == "bfloat16"
    assert embed(out="half") == 1
    assert "dtype 'bfloat16' (now 'float32')" in capsys.readouterr().err
    loaded = []
    monkeypatch.setattr("e5v_st.index.search.load_for", lambda args: loaded.append(args) or pytest.skip("loaded"))
    with pytest.raises(pytest.skip.Exception):
        search(index="half")
    assert loaded[0].dtype == "bfloat16"
    # Where there is a GPU, `load` takes bfloat16, but not for the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    origin = find_origin(small)
    assert [find_dtype(origin, None, device, None) for device in (None, "cuda:1", "cpu")] == [
        "bfloat16",
        "bfloat16",
        "float32",
    ]


def test_an_adapter_given_as_the_model_brings_its_base(small, goldens, tmp_path):
    folder = shutil.copytree(goldens / "legacy_adapter", tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(small)}))
    alone = manifests.describe_models(find_origin(folder), None, tmp_path)
    beside = manifests.describe_models(find_origin(small), find_origin(folder), tmp_path)
    assert alone["weights_sha256"] == beside["weights_sha256"]
    assert alone["adapter_sha256"] == beside["adapter_sha256"] is not None
    assert find_dtype(find_origin(folder), None, "cpu", None) == "float32"


def test_an_index_stays_on_the_commit_that_made_it(small, job):
    """In a process of its own: the hub's libraries read its address when they are imported."""
    changed = shutil.copytree(small, job / "changed")
    change_one_number(changed / MODEL)
    program = (
        "import sys; from e5v_st.cli import main\n"
        "first = sys.argv[1]\n"
        "def run(*words): print('rc', main([*words, '--device', 'cpu']), flush=True)\n"
        "embed = ('embed', 'images', 'hub-index', '--model')\n"
        "run(*embed, 'me/model', '--revision', first)\n"
        "run('search', 'hub-index', 'red')\n"
        "run(*embed, 'me/model')\n"
        "run(*embed, 'me/model@' + first)\n"
        "run(*embed, 'model')\n"
        "run(*embed, 'me/model', '--revision', 'no-such-branch')\n"
    )
    with HubServer() as hub:
        first = hub.add_repo("me/model", small)
        hub.add_repo("me/model", changed)
        env = {**os.environ, **hub.env(job / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", program, first]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if line.startswith("rc")] == [
        f"rc {code}" for code in (0, 0, 1, 0, 0, 1)
    ], done.stderr
    assert done.stdout.count("1 done already") == 2
    assert "does not have the weights of hub-index" in done.stderr
    assert f"was made with --model me/model@{first}: name that" in done.stderr
    assert "me/model (revision no-such-branch) cannot be fetched from the hub: " in done.stderr.splitlines()[-1]
    assert manifest("hub-index")["model"] == "../model"  # as it was named last
    expected = pq.read_table("index")["embedding"].to_pylist()
    np.testing.assert_array_equal(pq.read_table("hub-index")["embedding"].to_pylist(), expected)


def test_a_query_is_turned_as_the_images_of_its_index_were(job, model, monkeypatch, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open("images/0.png").convert("RGB")
    stored.save("images/turned.jpg", exif=exif, quality=95)
    plain, turned = model.encode(
        [Image.open("images/turned.jpg"), ImageOps.exif_transpose(Image.open("images/turned.jpg"))]
    )
    assert plain @ turned < 0.999
    monkeypatch.setenv("E5V_EXIF", "1")
    assert embed(out="with") == 0
    monkeypatch.setenv("E5V_EXIF", "0")
    assert embed(out="without") == 0
    rows = [{row["id"]: row["embedding"] for row in pq.read_table(name).to_pylist()} for name in ("with", "without")]
    np.testing.assert_allclose([row["turned.jpg"] for row in rows], [turned, plain], atol=1e-5)
    for index in ("with", "without"):
        for now in ("0", "1"):
            monkeypatch.setenv("E5V_EXIF", now)
            capsys.readouterr()
            assert main(["search", index, "--image", "images/turned.jpg", "--device", "cpu", "--top", "1"]) == 0
            assert capsys.readouterr().out.split()[:3] == ["1", "1.0000", "turned.jpg"]
            assert os.environ["E5V_EXIF"] == now


def test_an_index_of_an_older_version_is_refused(job, capsys):
    os.rename("index/_manifest.json", "index/manifest.json")
    os.rename("index/_shard-00000.sha256", "index/shard-00000.sha256")
    before = sorted(os.listdir("index"))
    for start in (embed, search):
        assert start() == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "index holds an index of an older version (manifest.json)" in error
        assert "embed into a new folder, or delete this one" in error
    assert sorted(os.listdir("index")) == before
