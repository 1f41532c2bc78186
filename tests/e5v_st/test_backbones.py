"""The table of families that a user sees."""

from __future__ import annotations

from e5v_st.backbones import EXAMPLES, table
from e5v_st.cli import main
from e5v_st.model.backbone_e5v import BACKBONES


def test_the_table_has_a_checkpoint_of_each_family(capsys):
    assert list(EXAMPLES) != []
    assert set(EXAMPLES) == {row.name for row in BACKBONES}
    assert main(["backbones"]) == 0
    shown = capsys.readouterr().out
    for row in BACKBONES:
        line = next(line for line in shown.splitlines() if line.split()[:1] == [row.name])
        assert EXAMPLES[row.name].checkpoint in line
    assert table().splitlines()[0].split()[0] == "family"
