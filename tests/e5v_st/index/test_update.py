"""``e5v index`` through the command line, on tables of LanceDB."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import killing
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from PIL import Image

from e5v_st import encoder, options
from e5v_st.cli import main
from e5v_st.index import lance_table, update
from e5v_st.index.feeds import digest_item
from e5v_st.index.lance_table import lock, open_lance

lancedb = pytest.importorskip("lancedb")


@pytest.fixture
def folder(pictures, tmp_path):
    """Eight images that differ, one of which is broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (20 + number, 16), (30 * number, 90, 200)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"broken")
    return folder


@pytest.fixture(autouse=True)
def one_model(model, monkeypatch, small):
    """The command loads the small checkpoint once for all tests."""
    stock = options.load_for
    monkeypatch.setattr(options, "load_for", lambda args, **more: model if Path(args.model) == small else stock(args))


@pytest.fixture
def embedded(monkeypatch):
    """The items that reach the model."""
    seen = []
    stock = encoder.stream_all

    def stream_all(model, items, **more):
        items = list(items)
        seen.extend(items)
        return stock(model, items, **more)

    monkeypatch.setattr(encoder, "stream_all", stream_all)
    return seen


@pytest.fixture
def index(small, tmp_path):
    def run(source, *more, table=tmp_path / "t.lance"):
        return main(["index", str(source), str(table), "--device", "cpu", "--model", str(small), *map(str, more)])

    return run


def read(path):
    rows = open_lance(path).search().to_arrow().to_pylist()
    return {row["id"]: row for row in rows}


def test_a_folder_becomes_a_table_with_the_embeddings_of_encode(index, folder, tmp_path, model, capsys):
    assert index(folder) == 0
    rows = read(tmp_path / "t.lance")
    assert sorted(rows) == [f"{n}.png" for n in (0, 1, 2, 4, 5, 6, 7)]
    expected = model.encode([str(folder / name) for name in rows])
    np.testing.assert_allclose([row["vector"] for row in rows.values()], expected, atol=1e-5)
    assert (rows["5.png"]["width"], rows["5.png"]["height"], rows["5.png"]["image"]) == (25, 16, "5.png")
    out = capsys.readouterr().out
    assert "row 3: cannot read" in out
    assert "1 rows could not be embedded" in out


def test_only_what_is_new_or_changed_is_embedded_and_what_vanished_goes_with_prune(index, folder, tmp_path, embedded):
    (folder / "3.png").unlink()
    index(folder)
    assert len(embedded) == 7
    embedded.clear()
    before = read(tmp_path / "t.lance")
    index(folder)
    assert embedded == []
    Image.new("RGB", (50, 50)).save(folder / "new.png")
    Image.new("RGB", (21, 77), "red").save(folder / "1.png")
    (folder / "0.png").rename(folder / "moved.png")
    (folder / "2.png").unlink()
    index(folder)
    assert sorted(item["image"].name for item in embedded) == ["1.png", "new.png"]
    after = read(tmp_path / "t.lance")
    assert after["moved.png"]["vector"] == before["0.png"]["vector"]
    assert after["1.png"]["vector"] != before["1.png"]["vector"]
    assert after["1.png"]["height"] == 77
    assert {"0.png", "2.png"} <= after.keys()
    embedded.clear()
    index(folder, "--prune")
    assert embedded == []
    assert sorted(read(tmp_path / "t.lance")) == sorted(path.name for path in folder.iterdir())


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_typed_columns_come_along_and_are_corrected_without_embedding(index, tmp_path, embedded):
    rows = [{"id": f"a'{n}", "text": f"dog {n}", "price": f"{n}.5", "new": "true", "stock": n} for n in range(4)]
    write_csv(tmp_path / "rows.csv", rows)
    columns = ("--columns", "price:float", "new:bool", "stock:int")
    index(tmp_path / "rows.csv", *columns)
    table = open_lance(tmp_path / "t.lance")
    assert [str(table.schema.field(name).type) for name in ("price", "new", "stock")] == ["double", "bool", "int64"]
    assert table.count_rows("price > 2 AND stock < 3 AND new") == 1
    embedded.clear()
    rows[2]["price"] = ""
    rows[3]["stock"] = 12345678901234567
    write_csv(tmp_path / "rows.csv", rows)
    index(tmp_path / "rows.csv")  # the table knows its columns
    assert embedded == []
    found = read(tmp_path / "t.lance")
    assert found["a'2"]["price"] is None
    assert found["a'3"]["stock"] == 12345678901234567
    assert found["a'3"]["text"] == "dog 3"


def test_rows_that_changed_places_keep_their_own_embeddings(index, tmp_path, embedded):
    """Without a column of ids, a row inserted at the top moves the numbers of all."""
    rows = [{"text": f"dog {n}"} for n in range(5)]
    write_csv(tmp_path / "rows.csv", rows)
    index(tmp_path / "rows.csv")
    by_text = {row["text"]: row["vector"] for row in read(tmp_path / "t.lance").values()}
    embedded.clear()
    write_csv(tmp_path / "rows.csv", [{"text": "a new one"}, *reversed(rows)])
    index(tmp_path / "rows.csv")
    assert embedded == [{"text": "a new one"}]
    found = read(tmp_path / "t.lance")
    assert [found[str(n)]["text"] for n in range(6)] == ["a new one", *(row["text"] for row in reversed(rows))]
    assert all(row["vector"] == by_text.get(row["text"], row["vector"]) for row in found.values())


def test_thumbnails_are_small_jpegs(index, folder, tmp_path):
    index(folder, "--thumbnails", "8")
    with Image.open(io.BytesIO(read(tmp_path / "t.lance")["5.png"]["thumbnail"])) as image:
        assert image.format == "JPEG"
        assert max(image.size) == 8


def test_the_shards_of_embed_go_into_a_table_without_a_model(folder, small, tmp_path, monkeypatch, index):
    out = tmp_path / "shards"
    main(["embed", str(folder), str(out), "--model", str(small), "--device", "cpu", "--rows-per-shard", "3"])
    monkeypatch.setattr(options, "load_for", None)
    table = tmp_path / "t.lance"
    assert main(["index", str(out), str(table)]) == 0
    shards = pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("*.parquet"))).to_pylist()
    found = read(table)
    assert {row["id"]: row["embedding"] for row in shards if row["error"] is None} == {
        name: row["vector"] for name, row in found.items()
    }
    job = lance_table.read_table_job(open_lance(table), table)
    manifest = json.loads((out / "_manifest.json").read_text())
    assert {name: job[name] for name in ("weights_sha256", "prompt", "dtype")} == {
        name: manifest[name] for name in ("weights_sha256", "prompt", "dtype")
    }
    assert (table / job["model"]).resolve() == small.resolve()
    assert main(["index", str(out), str(table), "--model", str(small)]) == 1


def test_a_table_of_shards_grows_with_their_source(folder, small, tmp_path, embedded, index):
    out = tmp_path / "shards"
    main(["embed", str(folder), str(out), "--model", str(small), "--device", "cpu"])
    assert main(["index", str(out), str(tmp_path / "t.lance"), "--thumbnails"]) == 0
    found = read(tmp_path / "t.lance")
    assert found["5.png"]["width"] == 25
    assert found["5.png"]["thumbnail"]
    embedded.clear()
    (folder / "3.png").unlink()
    Image.new("RGB", (50, 50)).save(folder / "new.png")
    assert index(folder) == 0
    assert [item["image"].name for item in embedded] == ["new.png"]
    assert main(["index", str(out), str(tmp_path / "other.lance")]) == 0  # the source has changed: embeddings alone
    assert read(tmp_path / "other.lance")["5.png"]["width"] is None
    assert main(["index", str(out), str(tmp_path / "other.lance"), "--thumbnails"]) == 1


def test_files_of_a_cluster_go_into_a_table_if_somebody_says_which_model_made_them(tmp_path, index, small, capsys):
    from e5v_st import E5VActor

    actor = E5VActor(str(small), device="cpu")
    (tmp_path / "cluster").mkdir()
    for part in range(2):
        ids = np.array([f"{part}{n}" for n in range(3)])
        batch = actor({"id": ids, "text": np.array([f"dog {name}" for name in ids])})
        pq.write_table(batch, tmp_path / "cluster" / f"{part}_000.parquet")
    assert main(["index", str(tmp_path / "cluster"), str(tmp_path / "t.lance")]) == 1
    assert "say it with --model" in capsys.readouterr().err
    assert index(tmp_path / "cluster") == 0
    assert sorted(read(tmp_path / "t.lance")) == ["00", "01", "02", "10", "11", "12"]
    np.testing.assert_allclose(
        read(tmp_path / "t.lance")["11"]["vector"], actor.model.encode({"text": "dog 11"}), atol=1e-5
    )


def test_another_model_other_settings_and_another_source_to_prune_are_refused(index, folder, tmp_path, capsys):
    index(folder)
    words = ["index", str(folder), str(tmp_path / "t.lance")]
    for more, message in (
        (["--model", "e5v-tiny"], "does not have the weights"),
        (["--prompt", "text"], "prompt None (now 'text')"),
        (["--dtype", "bfloat16"], "dtype 'float32' (now 'bfloat16')"),
        (["--thumbnails"], "thumbnails None (now 256)"),
    ):
        assert main([*words, *more]) == 1
        assert message in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "other")
    assert main(["index", str(tmp_path / "other"), words[2], "--prune"]) == 1
    assert "would remove the rows of the first" in capsys.readouterr().err


def test_numbered_rows_of_another_source_do_not_replace_those_of_the_first(index, tmp_path, capsys):
    write_csv(tmp_path / "a.csv", [{"text": "a dog"}, {"text": "a cat"}])
    write_csv(tmp_path / "b.csv", [{"text": "a car"}])
    index(tmp_path / "a.csv")
    assert index(tmp_path / "b.csv") == 1
    assert "they would replace rows of the first" in capsys.readouterr().err
    assert read(tmp_path / "t.lance")["0"]["text"] == "a dog"
    write_csv(tmp_path / "b.csv", [{"text": "a car", "id": "b0"}])
    assert index(tmp_path / "b.csv") == 0
    assert sorted(read(tmp_path / "t.lance")) == ["0", "1", "b0"]


def test_a_link_to_a_table_is_the_table_with_its_lock(index, folder, tmp_path, capsys):
    index(folder)
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / "link.lance"
    link.symlink_to(tmp_path / "t.lance")
    assert index(folder, table=link) == 0
    with lock(link):
        assert index(folder) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["t.lance"], "got no source"),
        (["x.csv", "t"], "ends with .lance"),
        (["x.csv", "t 1.lance"], "want a name of letters"),
        (["x.csv", "t.lance", "--columns", "vector"], "rename yours"),
        (["x.csv", "t.lance", "--columns", "nope"], "has no column 'nope'"),
        (["x.csv", "t.lance", "--columns", "text:int"], "a column of its own"),
        (["x.csv", "t.lance", "--columns", "name:int"], "row 0, column 'name': got 'a', want a number"),
        (["twice.csv", "t.lance"], "the id 'a' stands twice"),
        (["--stats", "t.lance"], "there is no table t.lance"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_and_leaves_no_table(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("id,text,name\na,dog,a\n")
    Path("twice.csv").write_text("id,text\na,dog\na,cat\n")
    assert main(["index", *words, *(["--model", "e5v-tiny"] if "--stats" not in words else [])]) == 1
    assert message in capsys.readouterr().err
    assert not Path("t.lance").exists()


def test_without_the_extra_the_line_names_it(monkeypatch, folder, tmp_path, capsys, index):
    for name in [name for name in sys.modules if name.split(".")[0] == "lancedb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    assert index(folder) == 1
    assert "pip install 'e5v-st[index]'" in capsys.readouterr().err


def test_stats_say_rows_size_model_and_indices(index, folder, tmp_path, capsys, model):
    index(folder, "--full-text")
    capsys.readouterr()
    assert main(["index", "--stats", str(tmp_path / "t.lance")]) == 0
    out = capsys.readouterr().out
    assert f"rows: 7, of {model.get_embedding_dimension()} numbers each" in out
    assert "goldens/small, weights " in out
    assert "index of text: FTS, 7 rows in it, 0 not yet" in out
    assert "index of vector: none" in out


def test_an_index_is_made_above_a_number_of_rows_and_takes_new_rows_in(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lance_table, "ANN_ROWS", 300)
    rng = np.random.default_rng(0)

    def write(count):
        vectors = rng.normal(size=(count, 16)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        cluster.mkdir(exist_ok=True)
        place = f"{len(list(cluster.iterdir()))}.parquet"
        names = [f"{place}-{n}" for n in range(count)]
        embeddings = pa.array(list(vectors), pa.list_(pa.float32()))
        pq.write_table(pa.table({"id": names, "embedding": embeddings}), cluster / place)

    cluster = tmp_path / "cluster"
    write(200)
    index(cluster)
    table = open_lance(tmp_path / "t.lance")
    assert lance_table.index_of(table, "vector") is None
    write(200)
    index(cluster)
    write(50)
    index(cluster)
    table = open_lance(tmp_path / "t.lance")
    state = table.index_stats(lance_table.index_of(table, "vector").name)
    assert (state.num_indexed_rows, state.num_unindexed_rows) == (450, 0)


# ---- what may go wrong ----


def test_a_second_writer_is_refused_and_the_lock_ends_with_its_process(index, folder, tmp_path, capsys):
    with lock(tmp_path / "t.lance"):
        assert index(folder) == 1
    assert "another process is writing" in capsys.readouterr().err
    code = f"path = pathlib.Path({str(tmp_path)!r}, 't.lance'); held = lock(path); held.__enter__(); os._exit(9)"
    imports = "import os, pathlib; from e5v_st.index.lance_table import lock; "
    assert subprocess.run([sys.executable, "-c", imports + code], check=False).returncode == 9
    assert (tmp_path / ".t.lance.lock").exists()
    assert index(folder) == 0


def test_two_writers_at_once_leave_each_row_once(folder, tmp_path, small):
    words = ["index", str(folder), str(tmp_path / "t.lance"), "--device", "cpu", "--model", str(small)]
    writers = [killing.start(main, words) for _ in range(2)]
    for writer in writers:
        writer.join()
    assert 0 in [writer.exitcode for writer in writers]
    assert {writer.exitcode for writer in writers} <= {0, 1}  # 1: it found the other at work
    rows = open_lance(tmp_path / "t.lance").search().select(["id"]).to_arrow()["id"].to_pylist()
    assert sorted(rows) == [f"{n}.png" for n in (0, 1, 2, 4, 5, 6, 7)]


@pytest.mark.slow
def test_killed_at_random_points_and_run_again_no_row_is_lost_or_doubled(folder, tmp_path, small, monkeypatch):
    def words(table):
        return ["index", str(folder), str(tmp_path / table), "--device", "cpu", "--model", str(small)]

    seconds = killing.run(_index_in_small_batches, words("undisturbed.lance"))
    killed = 0
    for alive in killing.kill_at_random(_index_in_small_batches, words("killed.lance"), seconds, seed=11):
        killed += alive
        table = open_lance(tmp_path / "killed.lance")
        rows = table.search().select(["id"]).to_arrow()["id"].to_pylist() if table else []
        assert len(rows) == len(set(rows))
        if len(rows) == 7:
            shutil.rmtree(tmp_path / "killed.lance")
    assert killed >= 2
    killing.run(_index_in_small_batches, words("killed.lance"))
    found, expected = read(tmp_path / "killed.lance"), read(tmp_path / "undisturbed.lance")
    assert found == expected
    assert open_lance(tmp_path / "killed.lance").count_rows() == 7


def _index_in_small_batches(words):
    update.BATCH_ROWS = 1
    return main(words)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(index, folder, tmp_path, capsys):
    with killing.full_disk(500):
        assert index(folder) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"e5v index: cannot write {tmp_path / 't.lance'}: ")
    assert index(folder) == 0
    assert len(read(tmp_path / "t.lance")) == 7


# ---- the hash of a content ----


def test_the_hash_of_an_item_is_that_of_its_bytes_wherever_they_are(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    as_file = digest_item({"image": tmp_path / "a"})
    assert as_file == digest_item({"image": b"abc"}) == digest_item({"image": {"bytes": b"abc", "path": "x"}})
    different = [
        *({"image": b"abc"}, {"text": "abc"}, {"image": b"abc", "text": ""}, {"image": [b"a", b"bc"]}),
        *({"image": [b"ab", b"c"]}, {"image": "https://a/b.png"}, {}),
    ]
    assert len({digest_item(item) for item in different}) == len(different)


def test_images_in_the_cells_of_parquet_and_of_a_dataset_on_the_hub(tmp_path, small, model, embedded):
    images = []
    for number in range(70):  # more than Parquet's rows in memory
        png = io.BytesIO()
        Image.new("RGB", (10 + number, 12), (3 * number, 90, 200)).save(png, "PNG")
        images.append({"bytes": png.getvalue(), "path": f"{number}.png"})
    rows = pa.table({"id": [f"r{n}" for n in range(70)], "image": images, "year": list(range(1900, 1970))})
    pq.write_table(rows, tmp_path / "rows.parquet")
    words = ["--device", "cpu", "--model", str(small), "--columns", "year:int", "--thumbnails", "8"]
    assert main(["index", str(tmp_path / "rows.parquet"), str(tmp_path / "file.lance"), *words]) == 0
    with HubServer() as hub:
        (tmp_path / "repo" / "data").mkdir(parents=True)
        shutil.copy(tmp_path / "rows.parquet", tmp_path / "repo" / "data" / "train.parquet")
        hub.add_repo("me/photos", tmp_path / "repo", repo_type="dataset")
        done = subprocess.run(
            [sys.executable, "-m", "e5v_st.cli", "index", "me/photos", str(tmp_path / "hub.lance"), *words],
            env={**os.environ, **hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    found, of_hub = read(tmp_path / "file.lance"), read(tmp_path / "hub.lance")
    assert [(found[f"r{n}"]["year"], found[f"r{n}"]["width"]) for n in (0, 69)] == [(1900, 10), (1969, 79)]
    expected = model.encode([{"image": images[n]["bytes"]} for n in range(70)])
    np.testing.assert_allclose([found[f"r{n}"]["vector"] for n in range(70)], expected, atol=1e-5)
    same = ("content", "details", "year", "width", "thumbnail", "image")
    for name, row in found.items():
        assert {key: of_hub[name][key] for key in same} == {key: row[key] for key in same}
