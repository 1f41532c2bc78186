"""Every public name has an example in its docstring, and the example runs as it stands."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import e5v_st

NAMES = sorted(set(e5v_st.__all__) - {"__version__"})


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with the image that the examples name."""
    Image.new("RGB", (60, 40), "white").save(tmp_path / "dog.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(workplace, name):
    value = getattr(e5v_st, name)
    # A dictionary has no docstring of its own
    text = value.__doc__ if callable(value) else importlib.import_module(f"e5v_st.{e5v_st._HOMES[name]}").__doc__
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert example.examples, f"{name} has no example"
    assert any(name in part.source for part in example.examples)
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not failed, "".join(said)


def test_type_checkers_see_every_public_name_where_it_lives():
    homes = {}
    for line in Path(e5v_st.__file__).read_text(encoding="utf8").splitlines():
        if line.startswith("    from ."):
            module, _, name = line.strip().removeprefix("from .").partition(" import ")
            homes[name] = module
    assert homes == e5v_st._HOMES
    assert set(e5v_st.__all__) == {*homes, "__version__"}


def test_words_is_the_function_whatever_was_imported():
    code = "import pkgutil, importlib, e5v_st\n"
    code += "for found in pkgutil.iter_modules(e5v_st.__path__, 'e5v_st.'): importlib.import_module(found.name)\n"
    code += "for name in e5v_st._HOMES: assert callable(getattr(e5v_st, name)) or name == 'PROMPTS', name\n"
    code += "assert e5v_st.words.__module__ == 'e5v_st.readout'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
