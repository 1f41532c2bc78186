from __future__ import annotations

import hashlib
import json
import os

import pytest

from e5v_st.training import readers
from e5v_st.training.examples import load_triplets
from e5v_st.training.readers import fetch


def test_a_missing_file_is_not_looked_for_on_the_hub():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere/a\.csv"):
        load_triplets("nowhere/a.csv")


def test_files_that_come_with_the_project_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, report = load_triplets("mteb_tasks/data/tiny_triplets.csv.gz")
    assert len(rows) == report.rows == 9336
    assert not report.incomplete


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    good = tmp_path / hashlib.sha256(b"good").hexdigest()
    (tmp_path / "file.csv").symlink_to(good)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(tmp_path / "file.csv"))
    good.write_bytes(b"good")
    assert fetch("some/data", "file.csv").read_bytes() == b"good"
    good.write_bytes(b"gold")
    with pytest.raises(ValueError, match="damaged"):
        fetch("some/data", "file.csv")


def test_the_papers_dataset_is_its_one_file(tmp_path, monkeypatch):
    asked = []
    path = tmp_path / "nli.csv"
    path.write_text("sent0,sent1,hard_neg\na,b,c\n")
    monkeypatch.setattr(readers, "fetch", lambda *what: asked.append(what) or path)
    assert len(load_triplets("princeton-nlp/datasets-for-simcse")[0]) == 1
    assert asked == [("princeton-nlp/datasets-for-simcse", "nli_for_simcse.csv")]


def test_a_local_folder_of_the_shape_of_a_hub_id_is_read_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "nli").mkdir(parents=True)
    file = tmp_path / "me" / "nli" / "train.jsonl"
    for text in ("a", "b"):
        file.write_text(json.dumps({"anchor": text, "positive": "c"}))
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert load_triplets("me/nli")[0]["anchor"][:] == [text]
