"""The store keeps what it was given, within bounds, whatever happens around it."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3

import killing
import numpy as np
import pytest

from e5v_st.mteb_tasks.store import REFRESH, Store, default_folder, open_store


def vectors(count, start=0, d=256):
    return {f"{i:020}".encode(): np.full(d, i, np.float32) for i in range(start, start + count)}


def test_what_is_put_is_found_by_another_store(tmp_path):
    given = vectors(2000)
    Store(tmp_path).put(given)
    found = Store(tmp_path).get([*given, b"unknown"])
    assert found.keys() == given.keys()
    assert all((found[key] == given[key]).all() for key in given)


def test_a_damaged_row_is_taken_for_missing(tmp_path):
    store = Store(tmp_path)
    given = vectors(2)
    store.put(given)
    one, other = given
    damaged = np.full(256, 9, np.float32).tobytes()
    store.database.execute("UPDATE embeddings SET value = ? WHERE key = ?", [damaged, one])
    assert store.get(given).keys() == {other}


def test_a_damaged_file_is_set_aside(tmp_path):
    (tmp_path / "embeddings.sqlite").write_bytes(b"no database at all" * 1000)
    store = Store(tmp_path)
    store.put(vectors(1))
    assert len(store.get(vectors(1))) == 1
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_what_was_not_used_for_longest_goes_first(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("e5v_st.mteb_tasks.store.time.time", lambda: next(clock))
    monkeypatch.setattr("e5v_st.mteb_tasks.store.REFRESH", 0)
    limit = 200_000
    store = Store(tmp_path, limit_bytes=limit)
    first = vectors(50)
    store.put(first)
    used = dict(list(first.items())[:10])
    store.get(used)
    for start in range(50, 400, 50):
        store.put(vectors(50, start))
        store.get(used)
    assert store.get(used).keys() == used.keys()
    assert not store.get(list(first)[10:])
    assert store.get(vectors(50, 350)).keys() == vectors(50, 350).keys()
    store.close()
    assert (tmp_path / "embeddings.sqlite").stat().st_size < 2 * limit


def _write(folder, number):
    store = Store(folder)
    for part in range(10):
        store.put(vectors(20, number * 1000 + part * 20, d=64))
        store.get(vectors(20, number * 1000))


def test_two_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(Store(tmp_path).get([*vectors(200), *vectors(200, 1000)])) == 400


def _write_and_die(folder):
    store = Store(folder)
    store.put(vectors(5))
    store.database.execute("BEGIN IMMEDIATE")
    store.database.execute("DELETE FROM embeddings")
    os._exit(9)


def test_a_killed_process_loses_only_what_was_not_handed_over(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert len(Store(tmp_path).get(vectors(5))) == 5


def test_a_fault_ends_the_keeping_with_a_warning_and_not_the_run(tmp_path):
    store = Store(tmp_path)
    store.put(vectors(1))
    store.database.execute("DROP TABLE embeddings")
    with pytest.warns(RuntimeWarning, match="no longer kept"):
        store.put(vectors(1))
    assert store.get(vectors(1)) == {}
    store.put(vectors(1))


def test_a_row_that_is_found_again_later_counts_as_used(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(vectors(1))
    before = store.database.execute("SELECT used FROM embeddings").fetchone()[0]
    store.get(vectors(1))
    assert store.database.execute("SELECT used FROM embeddings").fetchone()[0] == before
    monkeypatch.setattr("e5v_st.mteb_tasks.store.time.time", lambda: before + REFRESH)
    store.get(vectors(1))
    assert store.database.execute("SELECT used FROM embeddings").fetchone()[0] == before + REFRESH


def test_a_fault_of_the_caller_is_not_swallowed(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(TypeError), store._transaction():
        raise TypeError
    store.put(vectors(1))
    assert sqlite3.connect(store.path).execute("SELECT COUNT(*) FROM embeddings").fetchone() == (1,)


def test_a_folder_that_cannot_be_used_is_said_and_the_run_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="embeddings are not kept"):
        assert open_store(tmp_path / "file" / "folder") is None
    assert open_store(None) is None


def test_a_lock_that_others_hold_is_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("e5v_st.mteb_tasks.store.PATIENCE", 0.01)
    Store(tmp_path).put(vectors(1))
    other = sqlite3.connect(tmp_path / "embeddings.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        Store(tmp_path)
    other.execute("ROLLBACK")
    assert len(Store(tmp_path).get(vectors(1))) == 1


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("E5V_STORE", str(tmp_path))
    assert default_folder() == tmp_path
    for word in ("0", "off", "False"):
        monkeypatch.setenv("E5V_STORE", word)
        assert default_folder() is None
    monkeypatch.delenv("E5V_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "e5v"


def test_a_full_disk_ends_the_keeping_and_what_was_kept_stays(tmp_path):
    store = Store(tmp_path)
    store.put(vectors(20))
    with killing.full_disk(store.path.stat().st_size + 4096), pytest.warns(RuntimeWarning, match="no longer kept"):
        store.put(vectors(2000, 20))
    assert store.get(vectors(20)) == {}
    again = Store(tmp_path)
    assert again.get(vectors(2020)).keys() == vectors(20).keys()
    again.put(vectors(2000, 20))
    assert len(again.get(vectors(2020))) == 2020
