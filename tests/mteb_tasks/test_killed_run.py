"""A run of `mteb` that is killed goes on without encoding again what it had."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

COUNT = """
import json, sys
from mteb_tasks.encoder import E5VEncoder
stock, counts = E5VEncoder.encode, []
def encode(self, *args, **kwargs):
    found = stock(self, *args, **kwargs)
    counts.append(self.encoded)
    return found
E5VEncoder.encode = encode
sys.argv = ["mteb", *sys.argv[1:]]
from mteb.cli.build_cli import main
main()
print("ENCODED", sum(counts))
"""


def stored(folder) -> int:
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".lock",)]
    for file in files:
        try:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
                return store.execute("SELECT COUNT(*) FROM embeddings").fetchone()[0]
        except sqlite3.Error:
            continue
    return 0


def run_mteb(tmp_path, store, name):
    command = [sys.executable, "-c", COUNT, "run", "-m", "e5v-tiny", "-t", "E5VEmojiT2IRetrieval"]
    command += ["--output-folder", str(tmp_path / name)]
    environment = {**os.environ, "E5V_STORE": str(store)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def encoded_by(process) -> int:
    printed, _ = process.communicate()
    assert process.returncode == 0
    return int(printed.split("ENCODED")[-1])


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_it_has_encoded(tmp_path):
    everything = encoded_by(run_mteb(tmp_path, tmp_path / "undisturbed", "undisturbed"))
    store = tmp_path / "store"
    process = run_mteb(tmp_path, store, "killed")
    while process.poll() is None and not (store.is_dir() and stored(store)):
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.communicate()
    kept = stored(store)
    assert 0 < kept < everything
    assert encoded_by(run_mteb(tmp_path, store, "continued")) == everything - kept
