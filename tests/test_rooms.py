"""Which file may import which: arrows run one way, and there is no circle. Imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Folders of packages that are installed under another name.
PARTS = {"hub": "e5v_st.hub", "mteb_tasks": "e5v_st.mteb_tasks", "training": "e5v_st.training"}
#: Modules of the ground floor that a user enters by: they may use the index.
DOORS = {"e5v_st.cli", "e5v_st.demo", "e5v_st.ray_actor"}
#: What each room may import besides its own modules.
ALLOWED = {
    "model": set(),
    "ground": {"model"},
    "index": {"model", "ground"},
    "doors": {"model", "ground", "index"},
    "hub": {"model", "ground"},
    "mteb_tasks": {"model", "ground"},
    "training": {"model", "ground", "index"},
}
#: Programs that hand their words to the command line, and a maintainers' script.
EXCEPTIONS = {
    ("e5v_st.hub.__main__", "e5v_st.cli"),
    ("e5v_st.training.train_nli", "e5v_st.cli"),
    ("e5v_st.training.tiny.ship", "e5v_st.hub.merge"),
}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for folder in ("e5v_st", *PARTS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if "data" not in inside:  # a maintainers' script beside the data
                names = [PARTS.get(folder, folder), *inside]
                found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def room(name: str) -> str:
    parts = name.split(".")
    if name in DOORS:
        return "doors"
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "ground"


def imports(name: str) -> Iterator[str]:
    """The modules of this project that a module imports, those for type checkers alone left out."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _run_nodes(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from (known for alias in node.names if (known := _module(alias.name)))
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from filter(None, [_module(f"{base}.{alias.name}") or _module(base)])


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not is_for_types:
            yield child
            yield from _run_nodes(child)


def _module(name: str) -> str | None:
    return name if name in modules() else None


def test_what_is_read_are_the_imports():
    assert "e5v_st.model.prompts_e5v" in set(imports("e5v_st.model.items_e5v"))
    assert "e5v_st.loading" in set(imports("e5v_st.demo"))  # inside a function
    assert len(modules()) > 60


@pytest.mark.parametrize("name", modules())
def test_arrows_run_one_way(name):
    here = room(name)
    wrong = {other for other in imports(name) if room(other) not in {here, *ALLOWED[here]} and other != "e5v_st"}
    if here == "model":
        wrong |= {other for other in imports(name) if other == "e5v_st"}
    wrong -= {other for importer, other in EXCEPTIONS if importer == name}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_there_is_no_circle():
    left = {name: {other for other in imports(name) if other != name} - {"e5v_st"} for name in modules()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"imports that run in a circle, or hang on one: {', '.join(sorted(left))}"
