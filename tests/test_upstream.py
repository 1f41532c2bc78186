"""Private names of other libraries: each stands in one table with its reason, and is there in what is installed."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest

from e5v_st.model import upstream_e5v
from e5v_st.model.upstream_e5v import is_there
from e5v_st.mteb_tasks import upstream

ROOT = Path(__file__).parents[1]

#: Each table of private names, with the files that take such names from it alone.
TABLES = {
    "e5v_st/model/upstream_e5v.py": (upstream_e5v.PRIVATE_NAMES, ["e5v_st/model/*.py"]),
    "mteb_tasks/upstream.py": (upstream.PRIVATE_NAMES, ["mteb_tasks/*.py"]),
}


def test_the_installed_libraries_have_each_private_name():
    lost = [f"{name}: {reason}" for table, _ in TABLES.values() for name, reason in map(name_and_reason, table)]
    lost = [line for line in lost if not is_there(line.partition(": ")[0])]
    assert not lost, "gone upstream:\n" + "\n".join(lost)


def name_and_reason(row: tuple[str, ...]) -> tuple[str, str]:
    return row[0], "; ".join(row[1:])


def test_a_name_that_is_not_there_is_noticed():
    assert is_there("json:JSONDecoder.decode")
    assert is_there("json:JSONDecoder.decode(_w)")
    for name in ("json:JSONDecoder.undo", "json:JSONDecoder.decode(nothing)", "no_such_library:name"):
        assert not is_there(name)


@pytest.mark.parametrize("home", TABLES)
def test_private_names_stand_in_the_table_of_their_file(home):
    table, patterns = TABLES[home]
    known = {part for row in table for part in re.split(r"[:.()]", row[0])}
    files = {file for pattern in patterns for file in ROOT.glob(pattern)}
    unknown = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted(files)
        for name, overridden in private_names(file)
        if name not in known or (file != ROOT / home and not overridden)
    ]
    assert not unknown


def private_names(file: Path) -> list[tuple[str, bool]]:
    """Returns names with one underscore that are not a file's own, and whether a method of the file overrides them."""
    tree = ast.parse(file.read_text(encoding="utf8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id == "self"}  # fmt: skip
    found = [
        (node.attr, node.attr in own)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    found += [(node.arg or "", False) for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    return [(name, overridden) for name, overridden in found if name.startswith("_") and not name.startswith("__")]


def test_a_lost_name_of_a_frame_is_told_once(monkeypatch):
    names = {row.name for row in upstream_e5v.PRIVATE_NAMES}
    monkeypatch.setattr(upstream_e5v, "is_there", lambda name: name not in names)
    for call, effect in (
        (lambda: upstream_e5v.index_for_caller("a", 3), "the index of an item in an error may be that in its batch"),
        (lambda: upstream_e5v.find_caller(None), "all hidden states"),
    ):
        upstream_e5v._warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match=effect):
            call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    upstream_e5v._warn_once.cache_clear()


def test_an_overridden_method_that_is_gone_is_refused():
    with pytest.raises(RuntimeError, match="dict has no _load_model"):
        upstream_e5v.check_override(dict, "_load_model")
