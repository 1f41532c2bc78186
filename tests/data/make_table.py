"""Makes a fixture table with this version: ``python tests/data/make_table.py tests/data/tables/format-1``.

A version that changes the format of tables adds a fixture, and goes on reading those of the versions before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from e5v_st.cli import main
from e5v_st.index.table_search import open_for_search, search_table, vector_of

ROWS = [
    {"id": f"row-{number}", "caption": caption, "price": number + 0.5, "stock": number, "new": "true"}
    for number, caption in enumerate(("a red heart", "a blue car", "it's a dog", "ein Hund", "snow"))
]


def make(folder: Path) -> None:
    """Writes the table, and what a search of it found."""
    folder.mkdir(parents=True)
    table = folder / "rows.lance"
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf8")
    words = ["--columns", "price:float", "stock:int", "new:bool", "--full-text", "--model", "e5v-tiny"]
    assert main(["index", str(source), str(table), "--device", "cpu", *words]) == 0
    table.with_name(f".{table.name}.lock").unlink()
    opened, _ = open_for_search(table)
    found = search_table(opened, vector_of(opened, "row-2"), top=5)
    (folder / "found.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
