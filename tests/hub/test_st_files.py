"""The files that make a folder a sentence-transformers model."""

from __future__ import annotations

import json

import e5v_st
from e5v_st.hub.export import export


def test_the_files_are_those_that_a_saved_model_has(small, tmp_path):
    plain_folder, saved_folder = export(small, tmp_path / "exported"), tmp_path / "saved"
    e5v_st.load(small, device="cpu").save_pretrained(str(saved_folder))
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert json.loads((plain_folder / name).read_text()) == json.loads((saved_folder / name).read_text()), name
    for folder in ("1_Pooling", "2_Normalize"):
        found, saved = (
            json.loads((root / folder / "config.json").read_text()) for root in (plain_folder, saved_folder)
        )
        assert found == saved
    for file in saved_folder.glob("*.py"):
        assert (plain_folder / file.name).read_bytes() == file.read_bytes()
    assert len(list(plain_folder.glob("*.py"))) == len(list(saved_folder.glob("*.py"))) > 0
