"""What a path or a hub id names, decided without asking the hub; files and JSON that are written whole."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import e5v_st
from e5v_st.cli import main
from e5v_st.files import expand_home, is_hub_id, locate, read_json, write_atomically, write_json
from e5v_st.hub.folders import fetch
from e5v_st.training.data import find_file


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory and home: `data/photo/` and `data/rows.csv`."""
    (tmp_path / "data" / "photo").mkdir(parents=True)
    (tmp_path / "data" / "rows.csv").write_text("text\na\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["royokong/e5-v", "llava-hf/llava-v1.6-mistral-7b-hf", "me/a_b.c", "x/Qwen2.5-VL-3B"])
def test_what_has_the_form_of_a_hub_id_is_one(place, name):
    assert is_hub_id(name)
    assert locate(name) is None


def test_a_path_that_is_there_is_found_and_home_is_expanded(place):
    assert locate("data/photo") == Path("data/photo")
    assert locate("~/data/photo") == place / "data" / "photo"
    assert locate(place) == place
    words = ["embed", "~/x", "--model=~/data", "--query=a ~ b", "--image=~", "a=~/b"]
    assert expand_home(words) == ["embed", "~/x", f"--model={place}/data", "--query=a ~ b", f"--image={place}", "a=~/b"]


NOT_THERE = [
    ("data/photos", "is it data/photo?"),
    ("dta/photo", "is it data/photo?"),
    ("daata", "is it data?"),
    ("data/else", "though there is a folder data"),
    ("me/x.tar", "not a hub id"),
    ("data/x.tar", "not a hub id"),
    ("nothing", "not a hub id"),
    ("./me/x", "not a hub id"),
    ("/me/x", "not a hub id"),
    ("~/x", "not a hub id"),
    ("a/b/c", "not a hub id"),
    ("me/my model", "not a hub id"),
]


@pytest.mark.parametrize(("name", "message"), NOT_THERE)
def test_a_path_that_is_not_there_is_refused_with_what_is_like_it(place, name, message):
    with pytest.raises(ValueError, match="there is no file or folder") as caught:
        locate(name)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["data/photos", "data/x.tar", "~/x"])
@pytest.mark.parametrize("place_of_name", ["source", "model", "adapter", "load", "load adapter", "train", "hub"])
def test_every_place_that_takes_a_path_or_hub_id_says_so_at_once(place, name, place_of_name, capsys, monkeypatch):
    """Tests reach no hub, so whatever asked it would fail with another message."""
    if place_of_name in ("source", "model", "adapter"):
        words = {"source": [name, "out"], "model": ["data", "out", f"--model={name}"]}
        words["adapter"] = ["data", "out", "--model", "e5v-tiny", f"--adapter={name}"]
        monkeypatch.setattr("e5v_st.index.embed.open_source", lambda *_, **__: pytest.fail("the names come first"))
        assert main(["embed", *words[place_of_name]]) == 1
        message = capsys.readouterr().err
    else:
        calls = {
            "load": lambda: e5v_st.load(name),
            "load adapter": lambda: e5v_st.load("e5v-tiny", adapter=name),
            "train": lambda: find_file(name),
            "hub": lambda: fetch(name),
        }
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            calls[place_of_name]()
        message = str(caught.value)
    assert "there is no file" in message
    assert os.path.expanduser(name) in message or name in message


def test_a_file_that_is_being_written_has_a_name_that_readers_of_tables_skip(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Path, "replace", lambda self, target: seen.append((self.name, target.name)))
    write_atomically(tmp_path / "shard.parquet", b"")
    assert seen == [(f".shard.parquet.{os.getpid()}.part", "shard.parquet")]


def test_json_is_written_whole_as_json_reads_it_and_with_any_name(tmp_path):
    content = {"ids": ["ü", "half of a character \udce9", "\u2028"], "none": None}
    write_json(tmp_path / "a.json", content)
    data = (tmp_path / "a.json").read_bytes()
    assert json.loads(data) == content
    assert "ü" in data.decode()
    assert data.endswith(b"}\n")
    assert read_json(tmp_path / "a.json") == content
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_not_json_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} has no a.json"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON: Expecting"):
        read_json(tmp_path / "a.json")
