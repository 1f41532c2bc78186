from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import torch
from hub_client import TOKEN, contents

import e5v_st.hub.push
import e5v_st.model.modeling_e5v as modeling
from e5v_st.hub.card import Card
from e5v_st.hub.export import export
from e5v_st.hub.folders import fetch
from e5v_st.hub.merge import merge
from e5v_st.hub.push import push, stage
from e5v_st.hub.remote import explain, without_tokens

BASE = "royokong/e5-v"


def test_the_code_that_goes_up_is_this_packages_whatever_the_folder_holds(run, tmp_path):
    (run / "modeling_e5v.py").write_text("raise SystemExit")
    (run / "evil_e5v.py").write_text("raise SystemExit")
    (run / "setup.py").write_text("raise SystemExit")
    stage(run, tmp_path / "staged", Card(repo_id="me/x"), BASE)
    found = {file.name: file.read_bytes() for file in (tmp_path / "staged").rglob("*.py")}
    assert found.keys() == {f"{name}_e5v.py" for name in modeling.SOURCES}
    card = (tmp_path / "staged" / "README.md").read_text()
    for name, code in found.items():
        assert code == (e5v_st.hub.push.source_files()[0].parent / name).read_bytes()
        assert f"| {name} | `{hashlib.sha256(code).hexdigest()}` |" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "evil_e5v.Module"}, "'evil_e5v.Module', which is not a module of an E5-V"),
        ({"type": "sentence_transformers.models.WordEmbeddings"}, "not a module of an E5-V"),
        ({"path": "../../secret"}, "outside the folder: refused"),
        ({"path": "/etc"}, "outside the folder: refused"),
        ({"path": "..\\secret"}, "outside the folder: refused"),
    ],
)
def test_modules_that_are_not_ours_are_refused(run, tmp_path, change, message):
    modules = json.loads((run / "modules.json").read_text())
    modules[1].update(change)
    (run / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message.replace("\\", "\\\\")):
        stage(run, tmp_path / "staged", Card(repo_id="me/x"), BASE)


@pytest.mark.parametrize("name", ["../../evil.json", "../evil.safetensors", "a/../../../evil.json", "/tmp/evil.json"])
def test_a_repository_whose_names_climb_out_is_refused(server, small, tmp_path, name):
    server.add_repo("bad/model", {**contents(small), name: b"{}"})
    with pytest.raises(ValueError, match="refused"):
        fetch("bad/model")
    with pytest.raises(ValueError, match="refused"):
        export("bad/model", tmp_path / "out")
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "out").exists()


def test_no_pickle_is_read_written_or_passed_on(small, run, tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    for folder in (run,):
        for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "scheduler.pt", "state.pkl"):
            (folder / name).write_bytes(pickle.dumps(Bomb()))

    def refuse(*args, **kwargs):
        pytest.fail("a pickle was read or written")

    for name in ("torch.load", "torch.save", "pickle.load", "pickle.dump", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    outputs = [merge(run, tmp_path / "merged"), export(small, tmp_path / "native", native=True)]
    stage(run, tmp_path / "staged", Card(repo_id="me/x"), BASE)
    for folder in (*outputs, tmp_path / "staged"):
        kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
        assert kinds <= {".json", ".jinja", ".py", ".md", ".safetensors"}
    assert torch.load is refuse


@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "recipe.yaml"])
@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "aB3" * 11])
def test_a_file_that_holds_a_token_is_not_pushed(server, run, monkeypatch, name, secret):
    monkeypatch.setattr(e5v_st.hub.push, "check_reload", lambda folder, staged: None)
    content = {"note": secret} if name != "README.md" else f"---\nlicense: {secret}\n---\n"
    (run / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="holds an access token") as caught:
        push(run, "me/x", base=BASE)
    assert secret not in str(caught.value)
    assert server.requests == []


def test_tokens_are_blotted_out_of_messages():
    text = without_tokens(f"Bearer {TOKEN}: refused hf_abcDEF123.")
    assert TOKEN not in text
    assert "abcDEF" not in text
    assert TOKEN not in explain(ConnectionError(f"no way with {TOKEN}"), "me/x")


def test_paths_of_this_machine_do_not_get_into_cards(adapter, small, tmp_path):
    for folder in (merge(adapter, tmp_path / "merged"), export(small, tmp_path / "out")):
        card = (folder / "README.md").read_text()
        assert str(small.parent) not in card
        assert str(tmp_path) not in card
