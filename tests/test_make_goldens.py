"""The script that makes the golden files gives their numbers, as far as the installed transformers can make them."""

from __future__ import annotations

import runpy
import shutil

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script(goldens):
    return runpy.run_path(str(goldens / "make_goldens.py"))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[key], array, atol=2e-5, rtol=2e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(found[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["small", "realgrid"])
def test_a_plain_current_transformers_gives_the_golden_embeddings_again(script, goldens, name):
    found = script["embeddings"](name)
    expected = dict(np.load(goldens / f"{name}.upstream.npz"))
    del found["transformers"], expected["transformers"]
    assert_same(found, expected)
    paper = np.load(goldens / f"{name}.paper.npz")
    no_images = ("texts", "files", "changes", "text", "sts")  # the layouts are one
    assert_same({key: found[key] for key in no_images}, {key: paper[key] for key in no_images})


def test_a_plain_current_transformers_gives_the_golden_losses_again(script, goldens):
    expected = dict(np.load(goldens / "training.npz"))
    for key in ("texts", "files", "merged_text", "merged_image"):  # need transformers 4.41.2; see hub/test_merge.py
        del expected[key]
    assert_same(script["training"](), expected)


def test_the_golden_metrics_are_made_again(script, goldens, tmp_path):
    (tmp_path / "metrics.json").write_text(script["json"].dumps(script["metrics"]()))
    found, expected = script["read"](tmp_path / "metrics.json"), script["read"](goldens / "metrics.json")
    del expected["card"]
    assert_same(found, expected)


def test_compare_names_every_file_and_finds_a_small_difference(script, goldens, tmp_path, capsys):
    with pytest.raises(SystemExit, match="nothing to compare"):
        script["compare"](tmp_path)
    shutil.copy(goldens / "realgrid.paper.npz", tmp_path)
    numbers = dict(np.load(goldens / "small.paper.npz"))
    np.savez(tmp_path / "small.paper.npz", **numbers)
    script["compare"](tmp_path)
    said = capsys.readouterr().out
    assert all(f"{file.name}: " in said for file in [*goldens.glob("*.npz"), goldens / "metrics.json"])
    for change in (1e-4, np.nan):
        numbers["image"] = np.load(goldens / "small.paper.npz")["image"] + np.float32([change] + [0] * 127)
        np.savez(tmp_path / "small.paper.npz", **numbers)
        with pytest.raises(SystemExit, match="not the same"):
            script["compare"](tmp_path)
    del numbers["image"]
    np.savez(tmp_path / "small.paper.npz", **numbers)
    with pytest.raises(SystemExit, match="not the same"):
        script["compare"](tmp_path)
    assert "image is in one of the two only" in capsys.readouterr().out


def test_no_golden_file_is_written_over(script, goldens):
    before = {file: file.read_bytes() for file in goldens.glob("*.npz")}
    with pytest.raises(SystemExit, match="exists: name a new folder"):
        script["make"](goldens)
    assert before == {file: file.read_bytes() for file in goldens.glob("*.npz")}
