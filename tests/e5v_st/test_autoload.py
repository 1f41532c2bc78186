"""The startup hook: the published id loads by the literal line, and nothing else changes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from building import build, copy_source
from hub_server import HubServer

from e5v_st import autoload

LITERAL = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=sys.argv[3] == "trust", device="cpu")
print(type(model[0]).__name__, model[1].pooling_mode, "sts" in model.prompts)
if sys.argv[3] == "trust":
    np.save(sys.argv[2], model.encode(["A dog.", sys.argv[4], {"image": sys.argv[4], "text": "red"}]))
"""


@pytest.fixture(scope="module")
def hub(small):
    with HubServer() as server:
        server.add_repo("royokong/e5-v", small)
        server.add_repo("somebody/e5-v", small)
        yield server


def run_literal(hub, tmp_path, name="royokong/e5-v", trust="trust", picture="", **variables):
    environment = {**os.environ, **hub.env(tmp_path), "HF_HUB_OFFLINE": "0", **variables}
    command = [sys.executable, "-W", "ignore", "-c", LITERAL, name, str(tmp_path / "found.npy"), trust, picture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_literal_line_loads_the_published_id(hub, tmp_path, model, pictures):
    assert run_literal(hub, tmp_path, picture=pictures[0]) == ["E5VTransformer", "lasttoken", "True"]
    expected = model.encode(["A dog.", pictures[0], {"image": pictures[0], "text": "red"}])
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)
    offline = run_literal(hub, tmp_path, picture=pictures[0], HF_HUB_OFFLINE="1")
    assert offline == ["E5VTransformer", "lasttoken", "True"]


@pytest.mark.parametrize(
    ("name", "trust", "switch"),
    [("royokong/e5-v", "trust", "0"), ("royokong/e5-v", "no", "1"), ("somebody/e5-v", "no", "1")],
    ids=["switched off", "without trust", "another id"],
)
def test_otherwise_sentence_transformers_does_what_it_does(hub, tmp_path, name, trust, switch):
    trust = "no" if switch == "0" else trust
    assert run_literal(hub, tmp_path, name, trust, E5V_AUTOLOAD=switch)[1:] == ["mean", "False"]


def test_a_repository_with_modules_json_is_left_alone(hub, tmp_path, model, pictures):
    model.save_pretrained(str(tmp_path / "saved"))
    with HubServer() as server:
        server.add_repo("royokong/e5-v", tmp_path / "saved")
        assert run_literal(server, tmp_path, picture=pictures[0])[0] == "E5VTransformer"
        assert any("modeling_e5v.py" in path for _, path in server.requests)


def test_startup_imports_only_the_hook():
    heavy = "'torch', 'transformers', 'sentence_transformers', 'mteb', 'numpy', 'PIL', 'e5v_st.mteb_tasks'"
    code = f"import sys; found = [m for m in ({heavy}) if m in sys.modules]; assert not found, found"
    code += "; assert 'e5v_st.autoload' in sys.modules; import e5v_st; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_switch_switches_it_off():
    code = "import sys; assert 'e5v_st' not in sys.modules, sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "E5V_AUTOLOAD": "0"})


@pytest.mark.parametrize("word", ["0", "false", "No", " OFF "])
def test_every_word_for_off_switches_it_off(word, monkeypatch):
    tree = ast.parse((Path(__file__).parents[2] / "setup.py").read_text(encoding="utf8"))
    values = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "PTH")
    code = f"import sys; exec({ast.literal_eval(next(values))!r}); assert 'e5v_st' not in sys.modules"
    environment = {**os.environ, "E5V_AUTOLOAD": word}
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment)
    monkeypatch.setenv("E5V_AUTOLOAD", word)
    monkeypatch.setattr(sys, "meta_path", [])
    autoload.install()
    assert sys.meta_path == []


def test_a_fault_while_registering_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "e5v_probe.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(autoload.REGISTRATIONS, "e5v_probe", ("e5v_st.no_such_module", "register"))
    monkeypatch.setattr(sys, "meta_path", [autoload.Finder(), *sys.meta_path])
    with pytest.warns(RuntimeWarning, match="could not register itself with e5v_probe"):
        import e5v_probe
    assert e5v_probe.value == 7
    monkeypatch.delitem(sys.modules, "e5v_probe")


def test_installing_twice_adds_one_finder(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, autoload.Finder)])
    monkeypatch.delenv("E5V_AUTOLOAD", raising=False)
    autoload.install()
    autoload.install()
    assert sum(isinstance(finder, autoload.Finder) for finder in sys.meta_path) == 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_source(tmp_path_factory.mktemp("source"), "*.parquet", "*.safetensors")


@pytest.mark.parametrize("kind", ["build_wheel", "build_editable"])
def test_the_hook_is_installed_and_goes_with_the_package(kind, source, tmp_path):
    wheel = build(kind, source, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        record = next(name for name in archive.namelist() if name.endswith("RECORD"))
        listed = [line.split(",")[0] for line in archive.read(record).decode().splitlines()]
        archive.extractall(tmp_path / "site")
    assert {"e5v_st.pth", "e5v_st.start"} <= set(listed)  # pip removes what RECORD lists
    code = f"import site, sys; site.addsitedir({str(tmp_path / 'site')!r}); import e5v_st.autoload as a; "
    code += "assert any(isinstance(finder, a.Finder) for finder in sys.meta_path); print(a.__file__)"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "E5V_AUTOLOAD")}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    home = tmp_path / "site" if kind == "build_wheel" else source
    assert done.stdout.strip() == str(home / "e5v_st" / "autoload.py")
