from __future__ import annotations

import subprocess
import sys

import pytest

from e5v_st import cli, demo


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["demo", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = "import sys; from e5v_st.cli import main\n"
    code += f"try: main({words!r})\nexcept SystemExit as stop: assert not stop.code\n"
    code += "assert not {'torch', 'transformers', 'mteb', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout


def test_an_unknown_command_is_named(capsys):
    assert cli.main(["dmeo"]) == 2
    assert "no command 'dmeo'" in capsys.readouterr().err


def test_a_fault_is_one_line(capsys, tmp_path):
    assert cli.main(["demo", "--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("e5v demo: ")


def test_the_demo_prints_and_writes_what_it_found(small, tmp_path, capsys):
    page = tmp_path / "demo.html"
    assert cli.main(["demo", "--model", str(small), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "Sentences (down) and pictures (across)" in printed
    for query in demo.QUERIES:
        assert f"“{query}”" in printed
    text = page.read_text()
    assert text.count("<h2>") == len(demo.QUERIES) + 2
    assert text.count("data:image/png;base64,") == demo.MATRIX_SIZE + 5 * demo.TOP + 2
    assert not list(tmp_path.glob("*.part"))
