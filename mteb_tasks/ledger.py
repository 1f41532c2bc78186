"""The ledger of one pass over a task's rows: which contents each row has, and the hidden state of every content."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .contents import Content, Row
    from .store import Store

#: Rows that are looked up in the store together, and new states that are saved together.
LOOK_UP, SAVE_EVERY = 64, 128


class Ledger:
    """Has each distinct content embedded once, and gives each row the sum of the states of its contents.

    The model reads ahead: it takes a whole window of contents before it returns the first state. So the rows that are
    noted run ahead of the states that are known, and what lies between the two is awaited.

    Example, with three rows. The store holds the state of C. Row 2 has A again; beside it D is embedded, which no row
    of this pass needs, but a later pass will find in the store::

        row           rows       in the store   given to the model = awaited   later: states
        0: A, B       [a, b]     -              A, B                           a, b
        1: C          [c]        c              -                              c (at once)
        2: A (and D)  [a]        -              D (A is awaited already)       d

        the model returns three states  ->  receive() files them under a, b, d: the order of `awaited`
        sums()                          ->  [a + b, c, a]

    Args:
        fingerprint: Of the model; part of every key.
        store: Where states are looked up and saved; ``None`` looks up and saves nothing.
    """

    def __init__(self, fingerprint: bytes, store: Store | None = None) -> None:
        self.fingerprint = fingerprint
        self.store = store
        #: The keys of each row's contents.
        self.rows: list[list[bytes]] = []
        #: The states that are known, by key.
        self.states: dict[bytes, np.ndarray] = {}
        #: Key and number of rows so far of each content that the model has been given, in that order.
        self.awaited: deque[tuple[bytes, int]] = deque()
        self._unsaved: dict[bytes, np.ndarray] = {}

    def missing(self, rows: Iterable[Row]) -> Iterator[Content]:
        """Notes rows, and yields those of their contents that the model must embed; each is awaited from then on.

        Args:
            rows: Read a few at a time, as the model asks for more contents.
        """
        given: set[bytes] = set()
        rows = iter(rows)
        while chunk := list(islice(rows, LOOK_UP)):
            noted = self._note(chunk)
            if self.store:
                self.states.update(self.store.get(noted))
            for key, (content, count) in noted.items():
                if key not in self.states and key not in given:
                    given.add(key)
                    self.awaited.append((key, count))
                    yield content

    def _note(self, chunk: Iterable[Row]) -> dict[bytes, tuple[Content, int]]:
        """Notes the keys of some rows; returns their contents by key, each with the number of rows so far."""
        noted: dict[bytes, tuple[Content, int]] = {}
        for contents, beside in chunk:
            together = [*contents, *beside]
            keys = [content.key(self.fingerprint) for content in together]
            self.rows.append(keys[: len(contents)])
            for key, content in zip(keys, together, strict=True):
                noted.setdefault(key, (content, len(self.rows)))
        return noted

    def receive(self, state: np.ndarray) -> int:
        """Files the next state under the content that has been awaited for longest.

        Returns:
            The number of rows up to the first one that has this content, for a progress bar.
        """
        key, count = self.awaited.popleft()
        self.states[key] = self._unsaved[key] = state
        if len(self._unsaved) >= SAVE_EVERY:
            self.save()
        return count

    def save(self) -> None:
        """Hands new states to the store; those that are not finite are left out."""
        if self.store and self._unsaved:
            self.store.put({key: state for key, state in self._unsaved.items() if np.isfinite(state).all()})
        self._unsaved.clear()

    def sums(self, width: int) -> np.ndarray:
        """Returns the sum of the states of each row's contents, float32 ``(rows, width)``."""
        sums = [np.sum([self.states[key] for key in row], axis=0) for row in self.rows]
        return np.array(sums, np.float32).reshape(-1, width)
