"""What the hub's commands do when a folder cannot be written to its end."""

from __future__ import annotations

import killing
import pytest
from hub_client import contents

from e5v_st.hub.__main__ import main


@pytest.mark.parametrize("size", [100, 20_000, 300_000], ids=["configuration", "tokenizer", "weights"])
@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(adapter, small, tmp_path, capsys, command, size):
    out = tmp_path / "out" / "model"
    words = [command, str(adapter if command == "merge" else small), "--out", str(out), "--native"]
    with killing.full_disk(size):
        assert main(words) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"python -m hub {command}: ")]
    assert "File too large" in error
    assert not out.exists()
    assert not [path for path in out.parent.rglob("*") if path.is_file()]
    assert main(words) == 0
    assert (out / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_written_is_one_clear_line(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["export", str(small), "--out", str(tmp_path / "file" / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m hub export: ")
    assert contents(tmp_path) == {"file": b""}
