from __future__ import annotations

import base64
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from e5v_st import cli, demo

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["demo", "--help"], ["search", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = "import sys; from e5v_st.cli import main\n"
    code += f"try: main({words!r})\nexcept SystemExit as stop: assert not stop.code\n"
    code += "assert not {'torch', 'transformers', 'mteb', 'numpy', 'PIL', 'pyarrow', 'lancedb'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout


def test_an_unknown_command_is_named(capsys):
    assert cli.main(["dmeo"]) == 2
    assert "no command 'dmeo'" in capsys.readouterr().err


def test_a_fault_is_one_line(capsys, tmp_path):
    assert cli.main(["demo", "--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("e5v demo: ")


def test_a_name_that_the_terminal_cannot_show_is_escaped(small, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "gr\u00f6\u00dfe.png")
    index = str(tmp_path / "index")
    assert cli.main(["embed", str(folder), index, "--model", str(small), "--device", "cpu"]) == 0
    command = [sys.executable, "-m", "e5v_st.cli", "search", index, "red", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").split()[2] == r"gr\xf6\xdfe.png"  # as in Python's own repr


@pytest.mark.parametrize("dtype", ["auto", "float64", "fp16"])
def test_a_dtype_that_is_not_meant_is_refused(dtype, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["embed", str(tmp_path), str(tmp_path / "index"), "--dtype", dtype])
    assert f"invalid choice: '{dtype}' (choose from" in capsys.readouterr().err


def test_the_demo_prints_and_writes_what_it_found(small, tmp_path, capsys):
    page = tmp_path / "demo.html"
    assert cli.main(["demo", "--model", str(small), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Texts (down) and images (across)") == len(demo.PARTS)
    queries = [query for part in demo.PARTS for query in part.queries]
    for query in queries:
        assert f"“{query}”" in printed
    text = page.read_text()
    assert text.count("<h3>") == len(queries) + 3  # a composed query, and one image for each part
    assert text.count("data:image/png;base64,") == 2 * demo.MATRIX_SIZE + 6 * demo.TOP + 3
    assert not list(tmp_path.glob("*.part"))
    # Held-out combinations come first; what is unseen is said to be
    splits = pq.read_table(ROOT / "mteb_tasks" / "data" / "emoji.parquet", columns=["image", "split"]).to_pylist()
    split = {base64.b64encode(row["image"]).decode(): row["split"] for row in splits}
    first, second = text.split("Unseen concepts")
    found = [{split[png] for png in re.findall(r'base64,([^"]+)', half)} for half in (first, second)]
    assert found == [{"combination", "train"}, {"concept"}]  # the image of the composed query was in training
    for where in (printed, text):
        first, second = where.split("Unseen concepts")
        assert "never in this skin tone or gender" in first
        assert "neither these images nor their names" in second


@pytest.mark.parametrize("words", [[], ["--quantize", "int8"], ["--quantize=nf4"], ["--bits", "4"]])
def test_libraries_that_quantise_report_to_commands_that_quantise_alone(monkeypatch, words):
    loggers = [logging.getLogger(name) for name in ("torchao", "bitsandbytes.cextension", "torch.utils._pytree")]
    for name in cli.QUANTISING_LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)  # put back afterwards
        logging.getLogger(name).setLevel(logging.NOTSET)
    monkeypatch.setattr(demo, "add_arguments", lambda parser: parser.set_defaults(words=[]))
    monkeypatch.setattr(demo, "run", lambda args: sum(logger.isEnabledFor(logging.ERROR) for logger in loggers))
    assert cli.main(["demo", *words]) == (len(loggers) if words else 0)


def test_a_command_that_does_not_quantise_prints_nothing_of_libraries_that_do(small, tmp_path):
    """With what is installed here, some of which cannot load its own library on a machine without a GPU."""
    (tmp_path / "rows.csv").write_text("text\na dog\n")
    words = ["embed", str(tmp_path / "rows.csv"), str(tmp_path / "out"), "--model", str(small), "--device", "cpu"]
    command = [sys.executable, "-m", "e5v_st.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not re.search("torchao|bitsandbytes|kernels|failed|_pytree", done.stderr + done.stdout, re.IGNORECASE)
