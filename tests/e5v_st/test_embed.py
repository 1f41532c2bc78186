"""``e5v embed`` and ``e5v search`` through the command line."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from e5v_st import embed, search
from e5v_st.cli import main


@pytest.fixture
def folder(pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        shutil.copy(pictures[number % 4], folder / f"{number:02}.png")
    (folder / "03.png").write_bytes(b"broken")
    return folder


def run_embed(small, source, out, *more):
    return main(
        ["embed", str(source), str(out), "--model", str(small), "--device", "cpu", "--rows-per-shard", "5", *more]
    )


def read(out):
    return pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("*.parquet"))).to_pylist()


def test_a_folder_becomes_shards_with_ids_embeddings_and_errors(model, small, folder, tmp_path):
    out = tmp_path / "out"
    assert run_embed(small, folder, out) == 0
    rows = read(out)
    assert [row["id"] for row in rows] == [f"{number:02}.png" for number in range(12)]
    assert [row["error"] is None for row in rows].count(False) == 1
    assert rows[3]["embedding"] is None
    assert rows[3]["error"].startswith("row 3: cannot read")
    good = [row for row in rows if row["error"] is None]
    expected = model.encode([str(folder / row["id"]) for row in good])
    np.testing.assert_allclose([row["embedding"] for row in good], expected, atol=1e-5)
    assert len(list(out.glob("shard-*.parquet"))) == 3
    assert not list(out.glob("*.part"))


def test_tables_and_their_columns(model, small, tmp_path, pictures):
    rows = [{"id": f"r{i}", "caption": f"text {i}"} for i in range(7)]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_embed(small, table, tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    expected = model.encode([{"text": row["caption"]} for row in rows])
    np.testing.assert_allclose([row["embedding"] for row in found], expected, atol=1e-5)

    shutil.copy(pictures[0], tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("image,change\na.png,red\n")
    assert run_embed(small, tmp_path / "rows.csv", tmp_path / "csv", "--text-column", "change") == 0
    (row,) = read(tmp_path / "csv")
    np.testing.assert_allclose(row["embedding"], model.encode({"image": pictures[0], "text": "red"}), atol=1e-5)


def test_a_second_run_computes_nothing(small, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_embed(small, folder, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(embed, "load_for", lambda args: pytest.fail("nothing is left to compute"))
    assert run_embed(small, folder, out) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut off", "flipped", "no checksum", "gone"])
def test_a_damaged_shard_is_found_and_made_again(small, folder, tmp_path, damage):
    out = tmp_path / "out"
    run_embed(small, folder, out)
    expected, path = read(out), out / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    if damage == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "no checksum":
        path.with_suffix(".sha256").unlink()
    else:
        path.unlink()
    assert main(["search", str(out), "a dog", "--device", "cpu"]) == 1
    assert run_embed(small, folder, out) == 0
    assert read(out) == expected


def test_another_job_in_the_same_folder_is_refused(small, folder, tmp_path, capsys):
    run_embed(small, folder, tmp_path / "out")
    assert run_embed(small, folder, tmp_path / "out", "--image-layout", "paper") == 1
    assert "image_layout 'upstream' (now 'paper')" in capsys.readouterr().err


def test_each_process_takes_its_own_shards(small, folder, tmp_path, monkeypatch):
    run_embed(small, folder, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        before = len(list((tmp_path / "two").glob("*.parquet")))
        run_embed(small, folder, tmp_path / "two")
        assert len(list((tmp_path / "two").glob("*.parquet"))) - before == (2 if rank == "0" else 1)
    assert read(tmp_path / "two") == read(tmp_path / "one")


@pytest.mark.parametrize(
    ("source", "message"),
    [("empty", "has no images"), ("nothing.csv", "no file"), ("neither", "no folder"), ("a.csv", "--image-column")],
)
def test_sources_with_nothing_to_embed_are_refused(small, tmp_path, source, message, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    where = source if source == "neither" else tmp_path / source
    assert run_embed(small, where, tmp_path / "out") == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_points_and_continued_it_ends_in_the_same_files(small, folder, tmp_path):
    out, dice = tmp_path / "killed", random.Random(7)
    options = ["--model", str(small), "--device", "cpu", "--rows-per-shard", "5"]
    command, undisturbed = (
        [sys.executable, "-m", "e5v_st.cli", "embed", str(folder), str(into), *options]
        for into in (out, tmp_path / "undisturbed")
    )
    subprocess.run(undisturbed, check=True, capture_output=True)
    for _ in range(50 if os.environ.get("E5V_NIGHTLY") == "1" else 5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=dice.uniform(1, 9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    subprocess.run(command, check=True, capture_output=True)
    for path in sorted((tmp_path / "undisturbed").glob("shard-*")):
        assert (out / path.name).read_bytes() == path.read_bytes()


# ---- search ----


@pytest.fixture
def index(small, folder, tmp_path):
    run_embed(small, folder, tmp_path / "index")
    return tmp_path / "index"


def test_search_prints_ranks_cosines_and_ids(index, model, folder, capsys, tmp_path):
    capsys.readouterr()
    page = tmp_path / "page.html"
    picture = str(folder / "01.png")
    assert (
        main(["search", str(index), "red", "--image", picture, "--top", "3", "--device", "cpu", "--html", str(page)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    good = [file for file in sorted(folder.iterdir()) if file.name != "03.png"]
    scores = model.encode(list(map(str, good))) @ model.encode({"image": picture, "text": "red"})
    assert [line.split()[0] for line in lines[:3]] == ["1", "2", "3"]
    assert float(lines[0].split()[1]) == pytest.approx(scores.max(), abs=1e-4)
    assert page.read_text().count("data:image/png") == 3


def test_the_nearest_are_exact_in_blocks(monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 7)
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    random_numbers = np.random.default_rng(0)
    embeddings, query = random_numbers.normal(size=(50, 8)).astype(np.float32), np.ones(8, np.float32)
    expected = sorted(range(50), key=lambda row: -float(embeddings[row] @ query))[:5]
    found = search.nearest(query, embeddings, 5)
    assert [row for row, _ in found] == expected
    assert len(search.nearest(query, embeddings, 99)) == 50


def test_faiss_gives_the_same_ranks(monkeypatch):
    pytest.importorskip("faiss")
    random_numbers = np.random.default_rng(1)
    embeddings = random_numbers.normal(size=(3000, 64)).astype(np.float32)
    for query in random_numbers.normal(size=(20, 64)).astype(np.float32):
        found = search.nearest(query, embeddings, 25)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "faiss", None)
            expected = search.nearest(query, embeddings, 25)
        assert [row for row, _ in found] == [row for row, _ in expected]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=1e-5)


def test_compiling_changes_no_embedding(small, model, folder, tmp_path, monkeypatch):
    compiled = []

    def compile_quickly(self, **how):
        compiled.append(how)
        stock(self, **how, backend="eager")  # inductor takes a minute; see test_modeling_e5v.py

    stock = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    run_embed(small, folder, tmp_path / "plain")
    run_embed(small, folder, tmp_path / "compiled", "--compile")
    assert compiled == [{"dynamic": True}] * len(model[0].model.language_model.layers)
    for row, other in zip(read(tmp_path / "compiled"), read(tmp_path / "plain"), strict=True):
        assert row["error"] == other["error"]
        if row["embedding"]:
            np.testing.assert_allclose(row["embedding"], other["embedding"], atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["x"], "neither words nor --image"), (["x", "q", "--top", "0"], "--top 0"), (["nowhere", "q"], "is no index")],
)
def test_a_search_that_cannot_be_is_refused(words, message, capsys):
    assert main(["search", *words]) == 1
    assert message in capsys.readouterr().err
