"""``e5v embed`` and ``e5v search`` through the command line."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import killing
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import HubServer
from PIL import Image

from e5v_st import options, reading
from e5v_st.cli import main
from e5v_st.files import printable
from e5v_st.index import nearest, shards
from e5v_st.index import page as pages
from e5v_st.index.source import open_source
from e5v_st.model.modeling_e5v import E5VTransformer


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
    expected = {"image": pictures[0]}, {"text": "red"}, {"image": pictures[0], "text": "red"}
    image, text = ["--image-column", "image"], ["--text-column", "change"]
    for number, (names, item) in enumerate(zip((image, text, image + text), expected, strict=True)):
        assert run_embed(small, tmp_path / "rows.csv", tmp_path / f"csv {number}", *names) == 0
        (row,) = read(tmp_path / f"csv {number}")
        np.testing.assert_allclose(row["embedding"], model.encode(item), atol=1e-5)


def test_an_address_beside_a_text_is_not_taken_for_an_image(small, tmp_path, capsys):
    (tmp_path / "wiki.csv").write_text("id,url,title,text\n1,http://127.0.0.1:1/a.png,A,A dog.\n")
    assert run_embed(small, tmp_path / "wiki.csv", tmp_path / "out") == 0
    assert read(tmp_path / "out")[0]["error"] is None
    (tmp_path / "both.csv").write_text("image,caption\ngone.png,A dog.\n")
    assert run_embed(small, tmp_path / "both.csv", tmp_path / "both") == 1  # no row has an embedding
    assert "images are in the column 'image', texts in 'caption'" in capsys.readouterr().out


def test_a_second_run_computes_nothing(small, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_embed(small, folder, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(options, "load_for", lambda args: pytest.fail("nothing is left to compute"))
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
        shards.checksum_path(path).unlink()
    else:
        path.unlink()
    assert main(["search", str(out), "a dog", "--device", "cpu"]) == 1
    assert run_embed(small, folder, out) == 0
    assert read(out) == expected


def test_another_job_in_the_same_folder_is_refused(small, folder, tmp_path, capsys):
    run_embed(small, folder, tmp_path / "out")
    assert run_embed(small, folder, tmp_path / "out", "--image-layout", "paper") == 1
    assert "image_layout 'upstream' (now 'paper')" in capsys.readouterr().err


def test_another_content_or_other_columns_are_another_job(small, folder, tmp_path, pictures, capsys):
    table = tmp_path / "rows.csv"
    table.write_text("id,text,caption\n1,A dog.,A cat.\n")
    run_embed(small, table, tmp_path / "out")
    assert run_embed(small, table, tmp_path / "out", "--text-column", "caption") == 1
    assert "text_column 'text' (now 'caption')" in capsys.readouterr().err
    table.write_text("id,text,caption\n1,A car.,A cat.\n")
    assert run_embed(small, table, tmp_path / "out") == 1
    run_embed(small, folder, tmp_path / "pictures out")
    shutil.copy(pictures[0], folder / "03.png")
    assert run_embed(small, folder, tmp_path / "pictures out") == 1
    assert capsys.readouterr().err.count("was made from another content of ") == 2


def test_a_job_that_began_meanwhile_is_not_mixed_with_this_one(small, folder, tmp_path, monkeypatch, capsys):
    stock = options.load_for

    def load_slowly(args, **changes):
        monkeypatch.setattr(options, "load_for", stock)
        run_embed(small, folder, tmp_path / "out", "--prompt", "cirr-gallery")  # another process, which is faster
        return stock(args, **changes)

    monkeypatch.setattr(options, "load_for", load_slowly)
    assert run_embed(small, folder, tmp_path / "out") == 1
    assert "prompt 'cirr-gallery' (now None)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["prompt"] == "cirr-gallery"


def test_the_same_source_by_another_path_is_the_same_job(small, folder, tmp_path, monkeypatch, capsys):
    run_embed(small, folder, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert run_embed(small, "./pictures/", "out") == 0
    folder.rename(tmp_path / "moved")
    assert run_embed(small, "moved", "out") == 0
    assert capsys.readouterr().out.count("3 done already") == 2
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["source"] == "../moved"
    (tmp_path / "out" / "_manifest.json").unlink()
    assert run_embed(small, "moved", "out") == 0
    assert main(["search", "out", "red", "--device", "cpu"]) == 0
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    run_embed(small, "moved", "link")
    assert json.loads((tmp_path / "link" / "_manifest.json").read_text())["source"] == "../../moved"


def test_a_start_that_fails_leaves_nothing_behind(small, folder, tmp_path, capsys):
    assert run_embed(tmp_path / "no model", folder, tmp_path / "out") == 1
    assert run_embed(small, folder, tmp_path / "out", "--prompt", "cirr-quary") == 1
    assert "there is no prompt 'cirr-quary'; is it 'cirr-query'? There are " in capsys.readouterr().err
    assert run_embed(small, folder, tmp_path / "out", "--max-batch-tokens", "0") == 1
    assert "got --max-batch-tokens 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_with_errors_are_tried_again_on_request(model, small, folder, tmp_path, pictures, monkeypatch, capsys):
    table, out = tmp_path / "rows.csv", tmp_path / "out"
    table.write_text("image\n" + "".join(f"pictures/{name}.png\n" for name in ("00", "late", "01", "02", "gone", "04")))
    assert run_embed(small, table, out) == 0
    first = read(out)
    assert "2 rows could not be embedded" in capsys.readouterr().out
    shutil.copy(pictures[3], folder / "late.png")
    computed = []
    stock = reading._read_one
    monkeypatch.setattr(reading, "_read_one", lambda *args: computed.append(args[2]) or stock(*args))
    assert run_embed(small, table, out, "--retry-errors") == 0
    assert [item["image"].name for item in computed] == ["late.png", "gone.png"]
    second = read(out)
    assert [row["error"] is None for row in second] == [True, True, True, True, False, True]
    assert second[4]["error"].startswith("row 4: ")
    np.testing.assert_allclose(second[1]["embedding"], model.encode(pictures[3]), atol=1e-5)
    assert [second[row] for row in (0, 2, 3, 5)] == [first[row] for row in (0, 2, 3, 5)]


def test_a_repaired_source_is_taken_where_errors_are_tried_again(model, small, folder, tmp_path, pictures, capsys):
    assert run_embed(small, folder, tmp_path / "out") == 0
    first = read(tmp_path / "out")
    shutil.copy(pictures[3], folder / "03.png")
    assert run_embed(small, folder, tmp_path / "out") == 1
    assert "--retry-errors" in capsys.readouterr().err
    assert run_embed(small, folder, tmp_path / "out", "--retry-errors") == 0
    second = read(tmp_path / "out")
    np.testing.assert_allclose(second[3]["embedding"], model.encode(pictures[3]), atol=1e-5)
    assert second[:3] + second[4:] == first[:3] + first[4:]
    assert run_embed(small, folder, tmp_path / "out") == 0  # the manifest tells of the repaired one


def test_shards_without_their_manifest_are_taken_by_their_own_job_alone(model, small, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "t.csv").write_text("text\nA dog.\nA cat.\n")
    (tmp_path / "u.csv").write_text("text\nA red car.\nA house.\n")
    assert run_embed(small, tmp_path / "t.csv", out) == 0
    before = read(out)
    (out / "_manifest.json").unlink()
    assert run_embed(small, tmp_path / "u.csv", out) == 1
    assert (
        "holds shards of another job and no _manifest.json (shard-00000.parquet, 1 in all)" in capsys.readouterr().err
    )
    assert read(out) == before
    assert not (out / "_manifest.json").exists()
    assert run_embed(small, tmp_path / "t.csv", out) == 0
    assert "1 done already" in capsys.readouterr().out
    pq.write_table(pq.read_table(out / "shard-00000.parquet").replace_schema_metadata(), out / "shard-00000.parquet")
    (out / "_manifest.json").unlink()
    assert run_embed(small, tmp_path / "t.csv", out) == 1  # nothing says whose it is


def test_a_shard_of_another_index_is_found_and_made_again(model, small, tmp_path, capsys):
    for name, text in (("t", "A dog."), ("u", "A red car.")):
        (tmp_path / f"{name}.csv").write_text(f"text\n{text}\n")
        assert run_embed(small, tmp_path / f"{name}.csv", tmp_path / name) == 0
    for file in ("shard-00000.parquet", "_shard-00000.sha256"):
        shutil.copy(tmp_path / "t" / file, tmp_path / "u" / file)
    assert main(["search", str(tmp_path / "u"), "a dog", "--device", "cpu"]) == 1
    assert "holds shards of another job (shard-00000.parquet)" in capsys.readouterr().err
    assert run_embed(small, tmp_path / "u.csv", tmp_path / "u") == 0
    (row,) = read(tmp_path / "u")
    np.testing.assert_allclose(row["embedding"], model.encode({"text": "A red car."}), atol=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("text\nA dog.\nA cat.\n", "text\nA cat.\nA dog.\n", "has no column of ids"),
        ("id,text\n1,A dog.\n1,A cat.\n", "id,text\n1,A cat.\n1,A dog.\n", "has ids that stand in several rows"),
    ],
)
def test_a_changed_source_whose_ids_do_not_name_its_rows_is_not_repaired(small, tmp_path, before, after, why, capsys):
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text(before)
    assert run_embed(small, table, out) == 0
    assert run_embed(small, table, out, "--retry-errors") == 0  # the same content
    table.write_text(after)
    assert run_embed(small, table, out, "--retry-errors") == 1
    assert why in capsys.readouterr().err


def test_raising_names_the_row_and_keeps_the_shards_before(small, folder, tmp_path, capsys):
    (folder / "03.png").rename(folder / "08.png")
    assert run_embed(small, folder, tmp_path / "out", "--on-error", "raise") == 1
    assert "e5v embed: row 7: cannot read" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["shard-00000.parquet"]


def test_an_image_of_many_rows_is_computed_once_across_shards(small, folder, tmp_path, monkeypatch):
    computed = []
    stock = E5VTransformer.collate
    monkeypatch.setattr(
        E5VTransformer, "collate", lambda self, items, **more: computed.extend(items) or stock(self, items, **more)
    )
    run_embed(small, folder, tmp_path / "out")
    assert len(computed) == 4  # of 11 files


def test_images_as_bytes_and_paths_in_parquet(model, small, tmp_path, pictures):
    shutil.copy(pictures[0], tmp_path / "a.png")
    cells = [{"bytes": Path(pictures[1]).read_bytes(), "path": None}, {"bytes": None, "path": "a.png"}]
    cells.append({"bytes": b"no image", "path": None})
    pq.write_table(pa.table({"image": cells}), tmp_path / "rows.parquet")
    pq.write_table(pa.table({"image": [["a.png"]]}), tmp_path / "lists.parquet")
    run_embed(small, tmp_path / "rows.parquet", tmp_path / "out")
    rows = read(tmp_path / "out")
    expected = model.encode([pictures[1], pictures[0]])
    np.testing.assert_allclose([row["embedding"] for row in rows[:2]], expected, atol=1e-5)
    assert rows[2]["error"] == "row 2: cannot read a dict as an image: cannot identify image file"
    run_embed(small, tmp_path / "lists.parquet", tmp_path / "lists")
    pairs = datasets.Dataset.from_dict({"image": [cells[:1], cells[2:], cells[:1]], "other": [cells[2:]] * 3})
    images = datasets.List(datasets.Image())
    pairs.cast_column("image", images).cast_column("other", images).to_parquet(tmp_path / "pairs.parquet")
    assert run_embed(small, tmp_path / "pairs.parquet", tmp_path / "pairs") == 0
    assert [row["error"] is None for row in read(tmp_path / "pairs")] == [True, False, True]
    np.testing.assert_allclose(read(tmp_path / "lists")[0]["embedding"], expected[1], atol=1e-5)


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
    [
        ("empty", "has no images"),
        ("nothing.csv", "no file"),
        ("neither", "no file or folder"),
        ("a.csv", "--image-column"),
    ],
)
def test_sources_with_nothing_to_embed_are_refused(small, tmp_path, source, message, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    where = source if source == "neither" else tmp_path / source
    assert run_embed(small, where, tmp_path / "out") == 1
    assert message in capsys.readouterr().err


def test_a_folder_of_odd_files(model, small, pictures, tmp_path):
    folder = tmp_path / "odd"
    (folder / "sub" / "folder.png").mkdir(parents=True)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "text.jpg").write_text("a text")
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    good = ["a.png", '<b>&".png', "new\nline.png", "sub/ü.PNG"]
    for name in good:
        shutil.copy(pictures[0], folder / name)
    shutil.copy(pictures[0], os.fsencode(folder) + b"/caf\xe9.png")
    assert run_embed(small, folder, tmp_path / "out") == 0
    rows = {row["id"]: row for row in read(tmp_path / "out")}
    assert sorted(rows) == sorted([*good, "caf\\xe9.png", "broken.png", "empty.png", "pipe.png", "text.jpg"])
    for name in [*good, "caf\\xe9.png"]:
        np.testing.assert_allclose(rows[name]["embedding"], model.encode(pictures[0]), atol=1e-5)
    for name in ("broken.png", "empty.png", "pipe.png", "text.jpg"):
        assert rows[name]["embedding"] is None
        assert "cannot read" in rows[name]["error"]


def test_data_addresses_in_a_table_are_images_and_broken_ones_short_errors(model, small, pictures, tmp_path):
    address = "data:image/png;base64," + base64.b64encode(Path(pictures[0]).read_bytes()).decode()
    (tmp_path / "s.csv").write_text(f'id,image\na,"{address}"\nb,"{address[:60]}"\n')
    assert run_embed(small, tmp_path / "s.csv", tmp_path / "out") == 0
    good, bad = read(tmp_path / "out")
    np.testing.assert_allclose(good["embedding"], model.encode(pictures[0]), atol=1e-5)
    assert bad["embedding"] is None
    assert bad["error"].startswith("row 1: cannot read 'data:image/png;base64,… (60 characters)' as an image:")


def test_cells_of_a_table_are_the_text_that_stands_there(model, small, tmp_path):
    lines = ["id,text,", "007,NA,", "007,3,", 'x,"a, b",', "1e5,,", "None,None,"]
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert run_embed(small, tmp_path / "rows.csv", tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    assert [row["id"] for row in rows] == ["007", "007", "x", "1e5", "None"]
    assert [row["error"] is None for row in rows] == [True, True, True, False, True]
    assert rows[3]["error"].startswith("row 3: ")
    found = [row["embedding"] for row in rows if row["error"] is None]
    expected = model.encode([{"text": text} for text in ("NA", "3", "a, b", "None")])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # As pandas saves its index: a first column without a name
    (tmp_path / "index.csv").write_text(",id,text\n0,x,A dog.\n")
    assert run_embed(small, tmp_path / "index.csv", tmp_path / "with index") == 0
    assert [row["id"] for row in read(tmp_path / "with index")] == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "it is empty, want the names of the columns"),
        ("a.csv", b"id,text\n", "it holds no rows"),
        ("a.csv", b"text\ncaf\xe9\n", "line 2: the byte 0xe9 is not UTF-8"),
        ("a.csv", b'text\n"open\n', "line 2: its quotes do not fit"),
        ("a.csv", b"id;text\n1;a\n", "has semicolons between the names of the columns, want commas"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b"", "it holds no rows"),
        ("a.parquet", b"PAR1nope", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_line(small, tmp_path, name, content, message, capsys):
    (tmp_path / name).write_bytes(content)
    assert run_embed(small, tmp_path / name, tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"e5v embed: {tmp_path / name} cannot be read: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".csv.gz"])
def test_a_table_that_changed_is_read_again_though_its_time_did_not(model, small, tmp_path, suffix):
    table = tmp_path / f"s{suffix}"
    for name, text in (("A", "A dog."), ("B", "A cat.")):
        frame = pd.DataFrame({"id": [name], "text": [text]})
        if suffix == ".parquet":
            frame.to_parquet(table)
        elif suffix in (".json", ".jsonl"):
            frame.to_json(table, orient="records", lines=suffix == ".jsonl")
        else:
            frame.to_csv(table, sep="\t" if suffix == ".tsv" else ",", index=False)
        os.utime(table, (1_700_000_000, 1_700_000_000))
        assert run_embed(small, table, tmp_path / name) == 0
        (row,) = read(tmp_path / name)
        assert row["id"] == name
        np.testing.assert_allclose(row["embedding"], model.encode({"text": text}), atol=1e-5)
        content = json.loads((tmp_path / name / "_manifest.json").read_text())["content"]
        assert content == hashlib.sha256(table.read_bytes()).hexdigest()


def test_a_page_shows_the_pictures_of_a_table_that_changed_though_its_time_did_not(small, tmp_path, pictures):
    index, page = tmp_path / "index", tmp_path / "page.html"
    for number in (0, 1):
        shutil.copy(pictures[number], tmp_path / f"{number}.png")
        (tmp_path / "rows.csv").write_text(f"id,image\nx,{number}.png\n")
        os.utime(tmp_path / "rows.csv", (1_700_000_000, 1_700_000_000))
        shutil.rmtree(index, ignore_errors=True)
        run_embed(small, tmp_path / "rows.csv", index)
        assert main(["search", str(index), "red", "--device", "cpu", "--html", str(page)]) == 0
        assert base64.b64encode(Path(pictures[number]).read_bytes()).decode() in page.read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": 98765432109876543210 + i, "text": "a"} for i in range(3)],
        [{"id": "2024-01-31", "text": "2024-01-31T10:00:00Z"}],
        [{"id": 1, "text": "a"}, {"id": "x-1", "text": "b", "note": {"late": 1}}],
        [{"text": "a\u2028b"}],
    ],
)
def test_ids_and_texts_of_json_lines_are_what_stands_in_the_file(model, small, tmp_path, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf8")
    assert run_embed(small, tmp_path / "rows.jsonl", tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert [row["id"] for row in found] == [str(row.get("id", i)) for i, row in enumerate(rows)]
    expected = model.encode([{"text": row["text"]} for row in rows])
    np.testing.assert_allclose([row["embedding"] for row in found], expected, atol=1e-5)


def test_what_json_lines_hold_late_is_read_like_what_they_hold_early(tmp_path):
    """Behind the first 10 MiB, from which ``datasets`` guesses the types of columns."""
    rows: list[dict] = [{"id": i, "image": None, "text": "a" * 1000} for i in range(11_000)]
    rows += [{"id": "late", "image": "a.png", "text": "b", "note": {"x": 1}}, {"id": 25, "text": "c"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / "rows.jsonl"))
    assert list(source.ids) == [str(row["id"]) for row in rows]
    assert [source.item(row) for row in (0, 10_999)] == [{"text": "a" * 1000}] * 2
    assert source.item(11_000) == {"image": tmp_path / "a.png", "text": "b"}
    assert source.item(11_001) == {"text": "c"}


def test_an_empty_row_is_named_by_its_line_and_an_empty_line_is_told(model, small, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("id,text,image\n1,A dog.,\n\nx,,\n2,A cat.,\n")
    assert run_embed(small, tmp_path / "rows.csv", tmp_path / "out") == 0
    assert "1 empty line left out: line 3\n" in capsys.readouterr().out
    rows = read(tmp_path / "out")
    assert [row["id"] for row in rows] == ["1", "x", "2"]
    where = f"{tmp_path / 'rows.csv'}, line 4"
    assert rows[1]["error"] == f"row 1: nothing is in 'image' and 'text' ({where}): fill it in, or leave the row out"
    np.testing.assert_allclose(rows[2]["embedding"], model.encode({"text": "A cat."}), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "t.csv",
            "id,text\na,A dog.\n,A cat.\n",
            "line 3: got no id, want a text or a whole number in the column 'id'",
        ),
        ("t.jsonl", '{"id": 1, "text": "a"}\n{"text": "b"}\n', "line 2: got no id"),
        ("t.jsonl", '{"id": 1.10, "text": "a"}\n', "line 1: got the id 1.1, a float"),
        ("t.jsonl", '{"id": NaN, "text": "a"}\n', "line 1: got the id nan, a float"),
        ("t.jsonl", '{"id": true, "text": "a"}\n', "line 1: got the id True, a bool"),
        ("t.json", '[{"id": ["a"], "text": "a"}]', "row 1: got the id ['a'], a list"),
        ("t.parquet", {"id": [1, None], "text": ["a", "b"]}, "row 2: got no id"),
        ("t.parquet", {"id": [1.0, 2.5], "text": ["a", "b"]}, "row 1: got the id 1.0, a float"),
        ("t.parquet", {"id": [b"\xff"], "text": ["a"]}, "row 1: got the id b'\\xff', which is not UTF-8"),
    ],
)
def test_ids_that_are_missing_or_not_exact_are_refused_with_their_line(tmp_path, name, rows, message):
    if isinstance(rows, dict):
        pq.write_table(pa.table(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text(rows)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(str(tmp_path / name))


def test_ids_that_are_bytes_are_their_text(tmp_path):
    pq.write_table(pa.table({"id": ["größe".encode(), b"b"], "text": ["a", "b"]}), tmp_path / "t.parquet")
    assert open_source(str(tmp_path / "t.parquet")).ids == ["größe", "b"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_an_empty_text_is_no_text_in_every_format(tmp_path, suffix, blank):
    frame = pd.DataFrame({"image": ["a.png", ""], "text": [blank, blank]})
    path = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=suffix == "jsonl")
    source = open_source(str(path))
    assert [source.item(row) for row in (0, 1)] == [{"image": tmp_path / "a.png"}, {}]
    assert source.explain(1, "").startswith("row 1: nothing is in 'image' and 'text'")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["url", "caption"], "texts are in the column 'caption'; not used: 'url'"),
        (["url", "price"], "images are in the column 'url'"),
        (["path", "image", "size"], "images are in the column 'image'; not used: 'path'"),
        (["title", "text"], "texts are in the column 'text'; not used: 'title'"),
    ],
)
def test_the_columns_that_are_used_are_told_and_those_that_look_alike_and_are_not(tmp_path, names, wanted):
    (tmp_path / "t.csv").write_text(",".join(names) + "\n" + ",".join("a" for _ in names) + "\n")
    assert open_source(str(tmp_path / "t.csv")).notes == [wanted]


@pytest.mark.parametrize("option", ["--split", "--config", "--id-column", "--image-column", "--text-column"])
def test_options_that_are_not_for_a_source_are_refused(small, folder, tmp_path, option, capsys):
    assert run_embed(small, folder, tmp_path / "out", option, "x") == 1
    assert f"is a folder of images, which {option} cannot be used for" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("x,text\na,b\n")
    if option in ("--split", "--config"):
        assert run_embed(small, tmp_path / "t.csv", tmp_path / "out", option, "x") == 1
        assert f"t.csv is a file, which {option} cannot be used for" in capsys.readouterr().err


def test_a_data_set_of_the_hub_with_its_configuration_and_split(model, small, tmp_path, pictures):
    """In a process of its own: the hub's libraries read its address when they are imported."""

    def table(names):
        data = io.BytesIO()
        cells = [{"bytes": Path(name).read_bytes(), "path": None} for name in names]
        pq.write_table(pa.table({"id": list(map(str, names)), "image": cells}), data)
        return data.getvalue()

    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": f"{name}.parquet"}]} for name in ("a", "b")
    ]
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n"
    files = {"README.md": card, "a.parquet": table(pictures[:1]), "b.parquet": table(pictures[1:4])}
    more = ["--model", small, "--device", "cpu", "--split", "test"]
    command = [sys.executable, "-m", "e5v_st.cli", "embed", "me/products", tmp_path / "out", *more]

    def run(*words):
        env = {**os.environ, **hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        return subprocess.run([*command, *words], env=env, capture_output=True, text=True, check=False)

    with HubServer() as hub:
        hub.add_repo("me/products", files, repo_type="dataset")
        done = run()
        assert done.returncode == 1
        line = "e5v embed: me/products cannot be opened with --config None --split test: Config name is missing. "
        assert done.stderr.splitlines()[-1] == line + "Please pick one among the available configs: ['a', 'b']"
        done = run("--config", "b")
        assert done.returncode == 0, done.stderr
        assert "1 done already" in run("--config", "b").stdout
        hub.add_repo("me/products", {**files, "b.parquet": table([pictures[0], *pictures[2:4]])}, repo_type="dataset")
        done = run("--config", "b")
        assert done.returncode == 1
        assert "holds another job" in done.stderr
    rows = read(tmp_path / "out")
    assert [row["id"] for row in rows] == pictures[1:4]
    np.testing.assert_allclose([row["embedding"] for row in rows], model.encode(pictures[1:4]), atol=1e-5)


def test_exif_rotation_is_part_of_a_job(small, folder, tmp_path, monkeypatch, capsys):
    run_embed(small, folder, tmp_path / "out")
    monkeypatch.setenv("E5V_EXIF", "1")
    assert run_embed(small, folder, tmp_path / "out") == 1
    assert "exif False (now True)" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_points_and_continued_it_ends_in_the_same_files(small, folder, tmp_path):
    def words(out):
        return ["embed", str(folder), str(out), "--model", str(small), "--device", "cpu", "--rows-per-shard", "1"]

    seconds = killing.run(main, words(tmp_path / "undisturbed"))
    out = tmp_path / "killed"
    killed = 0
    for alive in killing.kill_at_random(main, words(out), seconds, seed=7):
        killed += alive
        if len(list(out.glob("_*.sha256"))) == 12:
            shutil.rmtree(out)
    assert killed >= 2
    out.mkdir(exist_ok=True)
    (out / f"._shard-00003.sha256.{2**22}.part").write_text("half")
    killing.run(main, words(out))
    undisturbed = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == undisturbed


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(small, folder, tmp_path, capsys):
    run_embed(small, folder, tmp_path / "undisturbed")
    out = tmp_path / "out"
    capsys.readouterr()
    with killing.full_disk(2000):  # room for the manifest, not for a shard
        assert run_embed(small, folder, out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"e5v embed: cannot write {out / 'shard-00000.parquet'}: File too large"
    assert [path.name for path in out.iterdir()] == ["_manifest.json"]
    with killing.full_disk(100):
        assert run_embed(small, folder, tmp_path / "other") == 1
    assert list((tmp_path / "other").iterdir()) == []
    assert run_embed(small, folder, out) == 0
    assert read(out) == read(tmp_path / "undisturbed")


SECRET = "hf_" + "aB3" * 11


def test_no_token_gets_into_any_output(model, small, folder, tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    (tmp_path / "rows.csv").write_text("image,text\ngone.png,a\nhttp://127.0.0.1:1/a.png,b\n,c\n")
    assert run_embed(small, folder, tmp_path / "out") == 0
    assert run_embed(small, tmp_path / "rows.csv", tmp_path / "rows") == 0
    assert run_embed("nobody/nothing", folder, tmp_path / "no model") != 0
    assert run_embed(small, "nobody/no-data", tmp_path / "no data") != 0
    assert main(["search", str(tmp_path / "out"), "q", "--device", "cpu", "--html", str(tmp_path / "page.html")]) == 0
    model.save_pretrained(str(tmp_path / "saved"))
    printed = capfd.readouterr()
    assert "e5v embed: " in printed.err
    assert SECRET not in printed.out + printed.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("out", ["file", "file/index"])
def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_read(small, tmp_path, out, monkeypatch, capsys):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr("e5v_st.index.embed.open_source", lambda *_, **__: pytest.fail("the folder comes first"))
    assert run_embed(small, tmp_path, tmp_path / out) == 1
    assert f"{tmp_path / out} cannot be written: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_shard_of_more_numbers_than_arrow_counts_is_refused(small, tmp_path, monkeypatch, capsys):
    dimension = 4096  # 2**31 numbers are 524288 rows of it
    shards.check_size(524_287, dimension)
    with pytest.raises(ValueError, match="use --rows-per-shard 524287 or less"):
        shards.check_size(524_288, dimension)
    (tmp_path / "t.csv").write_text("text\nA dog.\nA cat.\n")
    monkeypatch.setattr(shards, "MAX_NUMBERS", 200)
    assert run_embed(small, tmp_path / "t.csv", tmp_path / "out") == 1
    assert "are too many for one shard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_one_clear_line(small, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_embed(small, folder, tmp_path / "file" / "out") == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"/file/out cannot be written: {tmp_path / 'file'} is not a folder. Choose another")
    )


# ---- search ----


@pytest.fixture
def index(small, folder, tmp_path):
    run_embed(small, folder, tmp_path / "index")
    return tmp_path / "index"


def search_first(out, capsys, *words):
    """What the search prints, and the cosine of the best row."""
    capsys.readouterr()
    assert main(["search", str(out), *words, "--device", "cpu", "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, float(lines[-1].split()[1])


@pytest.mark.parametrize("prompt", ["sts", "Say it in one word: "])
def test_a_query_gets_the_prompt_of_its_index(model, small, pictures, tmp_path, prompt, capsys):
    (tmp_path / "t.csv").write_text("text\nA dog in the snow.\n")
    assert run_embed(small, tmp_path / "t.csv", tmp_path / "out", "--prompt", prompt) == 0
    lines, cosine = search_first(tmp_path / "out", capsys, "A dog in the snow.")
    assert len(lines) == 1
    assert cosine == 1
    lines, cosine = search_first(tmp_path / "out", capsys, "--image", pictures[0])
    assert lines[0].startswith(f"the index was made with --prompt {prompt}, which is not for such a query")
    stored = read(tmp_path / "out")[0]["embedding"]
    assert cosine == pytest.approx(float(model.encode({"image": pictures[0]}) @ stored), abs=1e-4)
    _, cosine = search_first(tmp_path / "out", capsys, "A dog in the snow.", "--prompt", "text")
    assert cosine == pytest.approx(float(model.encode({"text": "A dog in the snow."}) @ stored), abs=1e-4)


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


def in_shards(embeddings, size):
    """The rows as shards, with a gap before each: the first row has no embedding."""
    for start in range(0, len(embeddings), size):
        block = embeddings[start : start + size]
        yield (
            start // size * (size + 1) + 1 + np.arange(len(block)),
            [f"id {start + i}" for i in range(len(block))],
            block,
        )


def test_the_nearest_are_exact_shard_by_shard():
    random_numbers = np.random.default_rng(0)
    embeddings, query = random_numbers.normal(size=(50, 8)).astype(np.float32), np.ones(8, np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = sorted(range(50), key=lambda row: -float(embeddings[row] @ query))[:5]
    found = nearest.nearest(query, in_shards(embeddings, 7), 5)
    assert [hit.name for hit in found] == [f"id {row}" for row in expected]
    assert [hit.row for hit in found] == [row // 7 * 8 + 1 + row % 7 for row in expected]
    assert len(nearest.nearest(query, in_shards(embeddings, 7), 99)) == 50
    with pytest.raises(ValueError, match="the index has embeddings of 8 numbers, the model of 9"):
        nearest.nearest(np.ones(9, np.float32), in_shards(embeddings, 7), 5)


def test_embeddings_that_are_not_finite_are_not_ranked():
    embeddings = np.eye(8, dtype=np.float32)
    embeddings[5, 2] = np.nan
    with pytest.raises(ValueError, match="1 embeddings that are not finite, the first in row 6: embed again"):
        nearest.nearest(np.ones(8, np.float32), in_shards(embeddings, 8), 8)
    with pytest.raises(ValueError, match="the query's embedding is not finite"):
        nearest.nearest(np.full(8, np.inf, np.float32), in_shards(np.eye(8, dtype=np.float32), 8), 8)


def test_many_rows_have_the_ranks_of_a_plain_sort():
    random_numbers = np.random.default_rng(1)
    embeddings = random_numbers.normal(size=(3000, 64)).astype(np.float32)
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for query in random_numbers.normal(size=(20, 64)).astype(np.float32):
        found = nearest.nearest(query, in_shards(embeddings, 700), 25)
        cosines = units @ (query / np.linalg.norm(query))
        expected = np.argsort(-cosines)[:25]
        assert [hit.name for hit in found] == [f"id {row}" for row in expected]
        np.testing.assert_allclose([hit.score for hit in found], cosines[expected], rtol=1e-5)


def test_compiling_changes_no_embedding(small, model, folder, tmp_path, monkeypatch):
    compiled = []

    def compile_quickly(self, **how):
        compiled.append(how)
        stock(self, **how, backend="eager")  # inductor takes a minute; see test_modeling_e5v.py

    stock = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    run_embed(small, folder, tmp_path / "plain")
    run_embed(small, folder, tmp_path / "compiled", "--compile")
    parts = [part for layer in model[0].model.language_model.layers for part in layer.children()]
    assert compiled == [{"dynamic": True}] * len(parts)
    for row, other in zip(read(tmp_path / "compiled"), read(tmp_path / "plain"), strict=True):
        assert row["error"] == other["error"]
        if row["embedding"]:
            np.testing.assert_allclose(row["embedding"], other["embedding"], atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x"], "neither a text nor --image"),
        (["x", " "], "neither a text nor --image"),
        (["x", "q", "--top", "0"], "--top 0"),
        (["x", "gr\udcf6\udcdfe"], "the query is not utf-8, as this locale says: set LC_ALL"),
        (["nowhere", "q"], "is not an index"),
    ],
)
def test_a_search_that_cannot_be_is_refused(words, message, capsys):
    assert main(["search", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_page_shows_pictures_below_its_folder_and_nothing_else(tmp_path, pictures):
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(pictures[0], folder / "a.png")
    shutil.copy(pictures[0], folder / 'b" onerror="alert(1).png')
    shutil.copy(pictures[0], tmp_path / "outside.png")
    (folder / "secret.png").write_text("root:x:0:0")
    (folder / "secret.txt").write_text("root:x:0:0")
    (folder / "folder.png").mkdir()
    names = [
        f"{'a' * 300}.png",
        "../outside.png",
        str(tmp_path / "outside.png"),
        "/etc/passwd",
        "../../../../../etc/passwd",
        "secret.png",
    ]
    names += ["secret.txt", "folder.png", "sub/../../outside.png", "gone.png", "nul\0.png", ""]
    assert not any(pages.show_image(folder, name) for name in [*names, *({"path": name} for name in names), None, 3])
    page = pages.render_page("<script>", [nearest.Hit(0, "<img>", 0.5)], [""])
    assert "<img" not in page
    assert "<script>" not in page
    names = ["a.png", 'b" onerror="alert(1).png']
    shown = [pages.show_image(folder, name) for name in names]
    page = pages.render_page("q", [nearest.Hit(row, name, 0.5) for row, name in enumerate(names)], shown)
    assert page.count('<img alt="" src="data:image/png;base64,') == 2
    assert 'onerror="' not in page


def test_a_page_shows_the_pictures_of_a_table_from_any_folder(small, tmp_path, pictures, monkeypatch, capsys):
    shutil.copy(pictures[0], tmp_path / "a.png")
    pq.write_table(pa.table({"image": [Path(pictures[1]).read_bytes()]}), tmp_path / "bytes.parquet")
    (tmp_path / "rows.csv").write_text("id,image\nx,gone.png\ny,a.png\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for table in ("rows.csv", "bytes.parquet"):
        run_embed(small, table, f"{table} out")
    monkeypatch.chdir("elsewhere")
    for table in ("rows.csv", "bytes.parquet"):
        assert main(["search", f"../{table} out", "red", "--device", "cpu", "--html", "page.html"]) == 0
        assert "page.html, 1 of 1 with an image" in capsys.readouterr().out
    (tmp_path / "rows.csv").write_text("id,image\ny,a.png\nx,gone.png\n")
    assert main(["search", "../rows.csv out", "red", "--device", "cpu", "--html", "page.html"]) == 0
    assert "page.html, 0 of 1 with an image" in capsys.readouterr().out
    manifest = tmp_path / "bytes.parquet out" / "_manifest.json"
    job = json.loads(manifest.read_text())
    for other in ({"image_column": "gone"}, {"source": 3}, {"source": "elsewhere"}, {"content": None}):
        manifest.write_text(json.dumps({**job, **other}))
        assert main(["search", "../bytes.parquet out", "red", "--device", "cpu", "--html", "page.html"]) == 0
        assert "page.html, 0 of 1 with an image" in capsys.readouterr().out


def test_names_are_printed_on_one_line_without_control_characters():
    assert printable("a\nb\x1b[2Jü.png\u202e\udce9") == r"a\nb\x1b[2Jü.png\u202e\udce9"


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ("[]", "holds a list"), ("{}", "does not say source, model"), ('{"rows": 3}', "not say")],
)
def test_half_an_index_is_refused(small, folder, tmp_path, content, message, capsys):
    index = tmp_path / "index"
    index.mkdir()
    (index / "_manifest.json").write_text(content)
    assert main(["search", str(index), "q"]) == 1
    assert message in capsys.readouterr().err
    assert run_embed(small, folder, index) == 1
    assert "_manifest.json" in (error := capsys.readouterr().err) or "another job" in error


def test_an_index_that_was_not_finished_says_what_to_do(index, capsys):
    (index / "shard-00002.parquet").unlink()
    assert main(["search", str(index), "q", "--device", "cpu"]) == 1
    assert "lacks 1 of 3 shards: run the same `e5v embed` again" in capsys.readouterr().err


def deep_tiff(image: Image.Image) -> bytes:
    """The same image in 16 bits."""
    data = io.BytesIO()
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    deep.save(data, "TIFF")
    return data.getvalue()


@pytest.mark.parametrize("kind", ["TIFF", "TIFF of 16 bits", "JPEG2000", "PPM", "PNG", "JPEG", "WEBP", "GIF"])
def test_a_page_shows_what_browsers_cannot_show_as_png(tmp_path, pictures, kind):
    original = Image.open(pictures[0]).convert("L" if "16" in kind else "RGB")
    data = io.BytesIO()
    original.save(data, kind.split()[0], **({"irreversible": False} if kind == "JPEG2000" else {}))
    stored = deep_tiff(original) if "16" in kind else data.getvalue()
    shown = pages.show_image(tmp_path, stored)
    found = re.fullmatch(r'<img alt="" src="data:image/(png|jpeg|webp|gif);base64,(.*)">', shown)
    page = Image.open(io.BytesIO(base64.b64decode(found[2])))
    assert page.format.lower() == found[1]
    if kind in ("PNG", "JPEG", "WEBP", "GIF"):
        assert base64.b64decode(found[2]) == stored  # byte for byte
    else:
        np.testing.assert_array_equal(np.asarray(page.convert(original.mode)), np.asarray(original))


def test_a_large_copy_is_small_and_a_damaged_image_is_left_out(tmp_path, pictures):
    data = io.BytesIO()
    Image.open(pictures[0]).resize((3000, 1000)).save(data, "TIFF")
    shown = pages.show_image(tmp_path, data.getvalue())
    page = Image.open(io.BytesIO(base64.b64decode(shown.split("base64,")[1].removesuffix('">'))))
    assert page.size == (512, 171)
    assert pages.show_image(tmp_path, data.getvalue()[:5000]) == ""


# ---- other readers ----


def test_an_index_is_a_table_for_pandas_pyarrow_and_polars(small, folder, tmp_path):
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    out = tmp_path / "index"
    run_embed(small, folder, out)
    (out / ".shard-00001.parquet.1.part").write_bytes(b"half of a shard")  # of a process that was killed
    expected = read(out)
    import pyarrow.dataset

    assert pyarrow.dataset.dataset(out).to_table().to_pylist() == expected
    assert pq.read_table(out).to_pylist() == expected
    table = pandas.read_parquet(f"{out}/")
    assert table["id"].tolist() == [row["id"] for row in expected]
    assert table["error"].notna().tolist() == [row["error"] is not None for row in expected]
    for found, row in zip(table["embedding"], expected, strict=True):
        np.testing.assert_array_equal(found, row["embedding"])
    assert polars.read_parquet(out / "*.parquet").to_dicts() == expected


def test_an_index_is_a_table_for_duckdb(small, folder, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    run_embed(small, folder, tmp_path / "index")
    rows = duckdb.sql(f"SELECT id, embedding, error FROM '{tmp_path}/index/*.parquet' ORDER BY id").fetchall()
    assert rows == [(row["id"], row["embedding"], row["error"]) for row in read(tmp_path / "index")]


def test_a_column_with_blanks_around_its_name_is_shown_with_them(tmp_path):
    (tmp_path / "t.csv").write_text("id, text\na,A dog.\n")
    with pytest.raises(ValueError, match="has the columns 'id', ' text': say which"):
        open_source(str(tmp_path / "t.csv"))
    with pytest.raises(ValueError, match="has no column 'text', but 'id', ' text'"):
        open_source(str(tmp_path / "t.csv"), text="text")
