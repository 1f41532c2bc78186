from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from e5v_st import cli, starting
from e5v_st.index import search

#: Searches an index, and prints what was imported beyond torch and sentence-transformers, and what they import.
SEARCH = """
import contextlib, io, json, sys
import torch, sentence_transformers
from e5v_st.cli import main
before, found = set(sys.modules), []
for index in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["search", index, "a dog"]) == 0
    names = {name.split(".")[0] for name in set(sys.modules) - before}
    found.append(sorted(names - {name.split(".")[0] for name in before} - set(sys.stdlib_module_names)))
    before = set(sys.modules)
print(json.dumps(found))
"""
#: What lancedb itself imports, for its clients of servers.
LANCEDB = {"lancedb", "lance_namespace", "lance_namespace_urllib3_client"}


@pytest.fixture(scope="module")
def indexes(goldens, tmp_path_factory):
    root = tmp_path_factory.mktemp("indexes")
    (root / "images").mkdir()
    for image in sorted((goldens / "images" / "small").glob("*.png"))[:2]:
        shutil.copy(image, root / "images")
    for command, name in (("embed", "folder"), ("index", "table.lance")):
        assert cli.main([command, str(root / "images"), str(root / name), "--model", "e5v-tiny"]) == 0
    return root / "folder", root / "table.lance"


def test_a_search_imports_nothing_heavy_beside_torch_and_sentence_transformers(indexes):
    command = [sys.executable, "-c", SEARCH, *map(str, indexes)]
    folder, table = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert folder == []  # e5v_st was there before
    assert "lancedb" in table
    heavy = {"mteb", "gradio", "datasets", "pandas", "polars", "matplotlib", "peft", "ray", "langchain_core"}
    assert not heavy & set(table)
    assert {name for name in table if name.startswith("lance")} == LANCEDB


def test_the_collector_is_paused_while_a_search_imports_its_libraries(indexes, monkeypatch):
    """The import is what takes the time; a model's own objects are collected as ever."""
    seen = []
    importlib = SimpleNamespace(import_module=lambda name: seen.append((name, gc.isenabled())))
    monkeypatch.setattr(starting, "importlib", importlib)
    monkeypatch.setattr(gc, "freeze", lambda: seen.append("set aside"))
    monkeypatch.setattr(search, "load_for", lambda args: seen.append(("load", gc.isenabled())))
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    with search.open_model(search.read_job(indexes[0]), model=indexes[0], adapter=None, device="cpu"):
        pass
    assert seen == [("sentence_transformers", False), "set aside", ("load", True)]


def test_what_is_there_already_is_not_set_aside_again(monkeypatch):
    monkeypatch.setattr(starting, "gc", SimpleNamespace())  # has no freeze
    starting.import_for_good("json")


def test_the_collector_is_as_it_was_after_a_pause():
    with pytest.raises(ModuleNotFoundError):
        starting.import_for_good("no_such_module_of_anybody")
    assert gc.isenabled()
    gc.disable()
    try:
        with starting.collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
