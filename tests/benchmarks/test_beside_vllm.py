"""The comparison with vLLM runs from end to end where something else answers vLLM's calls: plain transformers."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import e5v_st
from e5v_st.hub.export import export

ROOT = Path(__file__).parents[2]
STANDIN = ROOT / "tests" / "data" / "vllm_standin"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """The scripts of benchmarks/ find each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """A folder of installed packages that has vllm."""
    folder = tmp_path_factory.mktemp("standin")
    shutil.copytree(STANDIN, folder, dirs_exist_ok=True)
    info = folder / "vllm-0.33.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n", encoding="utf8")
    return folder


def compare_ways(model, *words):
    """Runs the script, with one run of each way on a CPU."""
    import beside_vllm

    beside_vllm.main(["--device", "cpu", "--size", "mid", "--runs", "1", "--model", str(model), *map(str, words)])


def test_the_comparison_with_vllm_runs_to_its_table(small, standin, tmp_path, monkeypatch, capsys):
    path = os.pathsep.join(filter(None, [str(standin), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    out = tmp_path / "found.json"
    compare_ways(small, "--out", out, "--vllm-threads", "2")
    table, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["versions"]["vllm"]["vllm"] == "0.33.0"
    assert found["dtype"] == "float32"
    assert list(found["works"]) == ["texts", "images", "composed, an image each", "three prompts about an image"]
    for name, row in found["works"].items():
        assert row["least_cosine"] > 0.99999, name
        assert f"| {name} | {row['items']} |" in table
        assert [len(times) for times in row["all_seconds"].values()] == [1, 1]
    assert found["works"]["images"]["tokens"] > 2 * 60  # those of the images are counted


@pytest.fixture
def vllm(standin, monkeypatch):
    """vLLM's side in a thread instead of a process."""
    from beside_vllm import Vllm
    from vllm_way import serve

    monkeypatch.syspath_prepend(str(standin))
    here, there = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=[there], daemon=True)
    thread.start()
    yield Vllm(here)
    here.close()
    thread.join()
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def test_embeddings_of_something_else_are_not_timed(small, vllm, tmp_path, monkeypatch):
    from beside_vllm import make_works, measure

    folder = export(small, tmp_path / "native", native=True)
    vllm.call("open", {"folder": str(folder), "dtype": "float32", "memory": 0.45, "threads": 1})
    model = e5v_st.load(small, device="cpu")
    work = make_works({"texts": 3, "images": 1, "composed": 1})["texts"]
    row = measure("texts", work, model, vllm, "cpu", 1, 0.999)
    assert row["mean_cosine"] >= row["least_cosine"] > 0.99999
    assert row["tokens"] > 3 * 20
    monkeypatch.setattr(sys.modules["vllm"], "FAULT", "another token")
    with pytest.raises(SystemExit, match="texts: the ways disagree, cosine"):
        measure("texts", work, model, vllm, "cpu", 1, 0.999)


def test_cosines_are_those_of_the_rows():
    from beside_vllm import compare

    here, there = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 0.0], [0.6, 0.8]])
    found = compare("texts", here, there, 0.5)
    assert found["least_cosine"] == pytest.approx(0.8)
    assert found["mean_cosine"] == pytest.approx(0.9)
    for other in (np.full((2, 2), np.nan), np.ones((2, 3))):
        with pytest.raises(SystemExit, match="texts: "):
            compare("texts", here, other, 0.5)


def test_a_cache_that_stays_full_is_a_fault():
    from types import SimpleNamespace

    from vllm_way import empty_caches

    with pytest.raises(RuntimeError, match="what another has left"):
        empty_caches(SimpleNamespace(reset_prefix_cache=lambda: False))


def test_what_to_install_is_said_where_vllm_is_missing(small):
    with pytest.raises(SystemExit, match=r"pip install vllm==0\.33\.0"):
        compare_ways(small)
