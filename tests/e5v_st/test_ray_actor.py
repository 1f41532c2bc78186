"""Ray Data with a local Ray: the schema and the embeddings of ``e5v embed``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e5v_st import E5VActor
from e5v_st.cli import main

# Ray holds on to the process it runs in, so it gets one of its own. By default it listens on every address of a Linux
# machine, whatever it is told; the variable, which is on by default on other systems, keeps it to 127.0.0.1.
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
SCRIPT = """
import json, sys
import psutil, ray, ray.data
from e5v_st import E5VActor

table, model, temporary, out = sys.argv[1:]
ray.init(
    address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
    _node_ip_address="127.0.0.1", _temp_dir=temporary,
)
rows = [json.loads(line) for line in open(table)]
found = ray.data.from_items(rows).map_batches(
    E5VActor,
    fn_constructor_kwargs={"model": model, "device": "cpu"},
    compute=ray.data.ActorPoolStrategy(size=1),
    batch_size=4,
)
found.write_parquet(out)
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
sockets = [socket for process in family for socket in process.net_connections("inet") if socket.status == "LISTEN"]
print(json.dumps(sorted({socket.laddr.ip for socket in sockets})))
"""


@pytest.fixture
def rows(pictures, tmp_path):
    rows = [{"id": f"r{i}", "image": path, "text": "red" if i % 2 else None} for i, path in enumerate(pictures[:4])]
    rows += [{"id": "words", "image": None, "text": "a dog"}, {"id": "broken", "image": "nothing.png", "text": None}]
    return rows


@pytest.mark.slow
def test_a_local_ray_gives_the_rows_of_e5v_embed(small, rows, tmp_path):
    pytest.importorskip("ray")
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:  # Ray's sockets need a short path
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(table), str(small), temporary, str(tmp_path / "ray")],
            env={**os.environ, **LOCAL, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) <= {"127.0.0.1", "::ffff:127.0.0.1"}

    assert main(["embed", str(table), str(tmp_path / "embed"), "--model", str(small), "--device", "cpu"]) == 0
    (shard,) = (tmp_path / "embed").glob("*.parquet")
    expected = pq.read_table(shard)
    found = pa.concat_tables(pq.ParquetFile(path).read() for path in (tmp_path / "ray").glob("*.parquet"))
    assert found.schema.equals(expected.schema)
    found = {row["id"]: row for row in found.to_pylist()}
    assert set(found) == {row["id"] for row in rows}
    for row in expected.to_pylist():
        other = found[row["id"]]
        if row["id"] == "broken":
            assert other["embedding"] is row["embedding"] is None
            assert other["error"].startswith("row broken: cannot read")
        else:
            assert other["error"] is row["error"] is None
            np.testing.assert_allclose(other["embedding"], row["embedding"], atol=1e-5)


def test_images_may_be_bytes_or_arrays(small, model, pictures):
    from PIL import Image

    actor = E5VActor(str(small), prompt="cirr-gallery", device="cpu")
    expected = model.encode(pictures[:2], prompt_name="cirr-gallery")
    files, arrays = np.empty(2, object), np.empty(2, object)
    for number, path in enumerate(pictures[:2]):
        with open(path, "rb") as file:
            files[number] = file.read()
        arrays[number] = np.array(Image.open(path).convert("RGB"))
    for images in (files, arrays):
        found = actor({"id": np.arange(2), "image": images}).to_pydict()
        assert found["id"] == ["0", "1"]
        np.testing.assert_allclose(found["embedding"], expected, atol=1e-5)


def test_a_batch_without_ids_or_items_is_refused(small):
    actor = E5VActor(str(small), device="cpu")
    for columns in (["text"], ["id", "caption"]):
        with pytest.raises(ValueError, match=f"got the columns {', '.join(columns)}, want 'id'"):
            actor({column: np.array(["a"]) for column in columns})


def test_ids_and_empty_texts_are_read_as_those_of_a_table(small, model, pictures):
    actor = E5VActor(str(small), device="cpu")
    batch = {"id": np.array([b"one", 2], object), "image": np.array([str(pictures[0])] * 2, object)}
    found = actor({**batch, "text": np.array(["", " "], object)})
    assert found["id"].to_pylist() == ["one", "2"]
    expected = model.encode([{"image": str(pictures[0])}])[0]
    np.testing.assert_allclose(found["embedding"].to_pylist(), [expected] * 2, atol=1e-6)
    for wrong in (None, 1.5, True):
        with pytest.raises(ValueError, match="row 0 of the batch: got"):
            actor({"id": np.array([wrong], object), "text": np.array(["a"], object)})
