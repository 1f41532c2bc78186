"""A wheel in a fresh virtual environment: one name at the top, and no foreign folder gets in its way."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from building import build, copy_source
from PIL import Image

import e5v_st

FOREIGN = ("hub", "mteb_tasks", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = copy_source(tmp_path_factory.mktemp("source"))
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """The programs of a fresh virtual environment that holds the wheel; what it depends on comes from this one's."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but the .pth files in it are not read: the editable install stays out
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bin"


def test_a_wheel_has_one_name_at_the_top(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith("top_level.txt"))
        assert archive.read(record).decode().split() == ["e5v_st"]
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"e5v_st", "e5v_st.pth", "e5v_st.start"}


def test_a_wheel_holds_the_data_and_none_of_the_maintainers_scripts(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = (
        "mteb_tasks/data/emoji.parquet",
        "mteb_tasks/data/public_scores.json",
        "training/recipes/tiny.yaml",
        "hub/card.md.jinja",
        "tiny/model.safetensors",
    )
    assert {f"e5v_st/{name}" for name in wanted} <= names
    assert not [name for name in names if name.split("/")[-1] in ("make_emoji.py", "pretrain_tiny.py", "ship_tiny.py")]


@pytest.mark.parametrize(
    "words",
    [
        ["e5v", "--help"],
        ["e5v", "demo", "--html", "demo.html"],
        ["e5v", "embed", "--help"],
        ["e5v", "eval", "--help"],
        ["e5v", "export", "--help"],
        ["e5v", "push", "--help"],
        ["e5v", "train", "--help"],
        ["python", "-m", "e5v_st.hub", "--help"],
        ["python", "-m", "e5v_st.cli", "train", "--help"],
        ["python", "-c", "import mteb; print(mteb.get_task('E5VSTS12'), mteb.get_model_meta('royokong/e5-v').loader)"],
    ],
    ids=" ".join,
)
def test_foreign_folders_harm_no_command(words, bin_folder, tmp_path):
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a foreign folder was imported')")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(bin_folder / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "RuntimeWarning" not in done.stderr


# Encodes with the installed package, and says where that lies
ENCODE = """
import sys, numpy as np
import e5v_st
from PIL import Image
image = Image.open(sys.argv[2])
found = e5v_st.load(sys.argv[1], device="cpu").encode(["A dog.", image, {"image": image, "text": "is red"}])
np.save(sys.argv[3], found)
print(e5v_st.__file__)
"""


def test_a_model_of_another_family_gives_the_same_embeddings_from_a_wheel(bin_folder, checkpoint, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    image.save(tmp_path / "noise.png")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    base = str(checkpoint("smolvlm-instruct"))
    command = [str(bin_folder / "python"), "-c", ENCODE, base, str(tmp_path / "noise.png"), str(tmp_path / "found.npy")]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[-1]).is_relative_to(bin_folder.parent)
    expected = e5v_st.load(base, device="cpu").encode(["A dog.", image, {"image": image, "text": "is red"}])
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)
