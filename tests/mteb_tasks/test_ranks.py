"""Several processes: what only one of them may do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import mteb
import pytest

from e5v_st.mteb_tasks.upstream import leave_writing_to_rank_0

#: What is taken from other ranks.
PATCHED = (
    (mteb.ResultCache, "save_to_cache"),
    (mteb.AbsTask, "_save_task_predictions"),
    (sys.modules["mteb.evaluate"], "_evaluate_task"),
)

#: Stands in for codecarbon: as there, a file locks the machine, and a tracker without the lock never has a number.
CODECARBON = """
import os, pathlib, tempfile

LOCK = pathlib.Path(tempfile.gettempdir(), ".codecarbon.lock")

class EmissionsTracker:
    def __init__(self, *, save_to_file, save_to_api, logging_logger, allow_multiple_runs):
        assert not allow_multiple_runs
        try:
            LOCK.open("x").close()
            self.has_lock = True
        except FileExistsError:
            self.has_lock = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.has_lock:
            LOCK.unlink()
            self.final_emissions = 0.125
            with open(os.environ["TRACKED"], "a") as file:
                file.write(os.environ.get("RANK", "0"))
"""


@pytest.fixture
def machine(tmp_path):
    """Folder and environment of a machine with codecarbon, whose temporary files are its own."""
    (tmp_path / "packages" / "codecarbon").mkdir(parents=True)
    (tmp_path / "packages" / "codecarbon" / "__init__.py").write_text(CODECARBON)
    (tmp_path / "tmp").mkdir()
    path = os.pathsep.join([str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"TMPDIR": str(tmp_path / "tmp"), "TRACKED": str(tmp_path / "tracked"), "E5V_STORE": "0"}
    return tmp_path, {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **settings}


@pytest.mark.parametrize("asked", [None, True])
def test_another_rank_does_not_track_emissions(machine, monkeypatch, asked):
    """As rank 1 finds a machine on which rank 0 tracks."""
    folder, _ = machine
    (folder / "tmp" / ".codecarbon.lock").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.syspath_prepend(str(folder / "packages"))
    monkeypatch.delitem(sys.modules, "codecarbon", raising=False)
    evaluate = sys.modules["mteb.evaluate"]
    for owner, name in PATCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back afterwards
    model, task = mteb.get_model("mteb/baseline-random-encoder"), mteb.get_task("E5VEmojiSTS")
    with pytest.raises(AttributeError, match="final_emissions"):
        evaluate.evaluate(model, task, cache=None, co2_tracker=asked)
    monkeypatch.setenv("RANK", "1")
    leave_writing_to_rank_0()
    result = evaluate.evaluate(model, task, cache=None, co2_tracker=asked)
    assert result.task_results[0].kg_co2_emissions is None
    sys.modules.pop("codecarbon")


@pytest.mark.slow
def test_two_processes_track_emissions_once(machine):
    folder, _ = machine
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mteb"]
    command = [*launched, "run", "-m", "e5v-tiny", "-t", "E5VEmojiSTS", "--output-folder", str(folder / "out")]
    done = subprocess.run(command, cwd=folder, env=machine[1], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (folder / "out").rglob("E5VEmojiSTS.json")
    assert json.loads(file.read_text())["kg_co2_emissions"] == 0.125
    assert (folder / "tracked").read_text() == "0"


def test_a_process_without_rows_reads_none():
    """Such as the eighth of eight, where a task has the names of two classes."""
    from test_mteb_encoder import loader

    from e5v_st.mteb_tasks.encoder import _own_rows

    inputs = loader(text=["a negative review", "a positive review"])
    assert list(_own_rows(inputs, range(2, 2))) == []
    assert [row["text"] for row in _own_rows(inputs, range(1, 2))] == ["a positive review"]
