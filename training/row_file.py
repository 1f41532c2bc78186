"""Training rows in a file that is mapped into memory, so that processes that read ahead share them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

#: Rows that are written together.
WINDOW = 256


class ItemWriter:
    """Writes rows of items to a file that lasts as long as the process.

    Args:
        roles: The columns.
        text_only: Write plain texts.
        with_label: Whether a number stands behind a row's items.
    """

    def __init__(self, roles: Sequence[str], text_only: bool, *, with_label: bool) -> None:
        import pyarrow as pa

        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        item = pa.string() if text_only else pa.struct([("text", pa.string()), ("images", pa.list_(image))])
        label = [("label", pa.float32())] if with_label else []
        self.schema = pa.schema([*((role, item) for role in roles), *label])
        self.text_only, self.rows = text_only, 0
        self._folder = Path(tempfile.mkdtemp(prefix="e5v-rows-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self._file = self._folder / "rows.arrow"
        self._writer = pa.ipc.new_stream(str(self._file), self.schema)
        self._waiting: list[list[Any]] = []

    def add(self, items: Sequence[Any]) -> None:
        """Adds a row."""
        own = [item["text"] if self.text_only and isinstance(item, dict) else item for item in items]
        self._waiting.append(own)
        self.rows += 1
        if len(self._waiting) == WINDOW:
            self._write()

    def _write(self) -> None:
        self._writer.write_batch(self._batch(list(zip(*self._waiting, strict=True))))
        self._waiting = []

    def _batch(self, columns: Sequence[Sequence[Any]]) -> pa.RecordBatch:
        import pyarrow as pa

        arrays = [pa.array(column, each.type) for column, each in zip(columns, self.schema, strict=True)]
        return pa.record_batch(arrays, schema=self.schema)

    def finish(self) -> Dataset:
        """Returns the rows."""
        from datasets import Dataset

        if self._waiting:
            self._write()
        self._writer.close()
        return Dataset.from_file(str(self._file))
