"""A run of `mteb` that is killed goes on without encoding again what it had."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import killing
import pytest


def mteb(words: list[str]) -> None:
    """Runs mteb's own command line, and leaves beside the results how many contents were encoded."""
    from mteb.cli.build_cli import main

    from e5v_st.mteb_tasks.encoder import E5VEncoder

    stock, counts = E5VEncoder.encode, []

    def encode(self, *args, **kwargs):
        found = stock(self, *args, **kwargs)
        counts.append(self.encoded)
        return found

    E5VEncoder.encode = encode
    main()
    Path(words[-1], "encoded").write_text(str(sum(counts)))


def words(folder: Path) -> list[str]:
    return ["run", "-m", "e5v-tiny", "-t", "E5VEmojiT2IRetrieval", "--output-folder", str(folder)]


def store_in(folder: Path) -> dict[str, str]:
    return {"E5V_STORE": str(folder)}


def stored(folder: Path) -> int:
    file = folder / "embeddings.sqlite"
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
            return store.execute("SELECT COUNT(*) FROM embeddings").fetchone()[0]
    except sqlite3.Error:
        return 0


def encoded(folder: Path) -> int:
    return int((folder / "encoded").read_text())


def without_times(content: Any) -> Any:
    """The scores, without what tells how long it took and how much came out of the store."""
    if isinstance(content, list):
        return [without_times(part) for part in content]
    if not isinstance(content, dict):
        return content
    own = ("date", "evaluation_time", "evaluation_phases", "seconds", "encoded")
    return {key: without_times(value) for key, value in content.items() if key not in own}


def results(folder: Path) -> dict[str, Any]:
    return {path.name: without_times(json.loads(path.read_text())) for path in folder.rglob("*.json")}


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_it_has_encoded(tmp_path):
    killing.run(mteb, words(tmp_path / "undisturbed"), store_in(tmp_path / "whole"))
    everything = encoded(tmp_path / "undisturbed")
    store = tmp_path / "store"
    process = killing.start(mteb, words(tmp_path / "killed"), store_in(store))
    while process.is_alive() and not stored(store):
        process.join(0.01)
    process.kill()
    process.join()
    kept = stored(store)
    assert 0 < kept < everything
    killing.run(mteb, words(tmp_path / "continued"), store_in(store))
    assert encoded(tmp_path / "continued") == everything - kept


@pytest.mark.slow
def test_killed_at_random_points_and_continued_it_ends_in_the_same_results(tmp_path):
    seconds = killing.run(mteb, words(tmp_path / "undisturbed"), store_in(tmp_path / "whole"))
    killed = 0
    for alive in killing.kill_at_random(mteb, words(tmp_path / "killed"), seconds, 3, store_in(tmp_path / "store")):
        killed += alive
        if not alive:
            shutil.rmtree(tmp_path / "killed")
            shutil.rmtree(tmp_path / "store")
    assert killed >= 2
    killing.run(mteb, words(tmp_path / "killed"), store_in(tmp_path / "store"))
    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")
    assert results(tmp_path / "killed").keys() == {"E5VEmojiT2IRetrieval.json", "model_meta.json"}
    assert stored(tmp_path / "store") == stored(tmp_path / "whole") > 0
