"""Starting a command quickly: heavy imports without the garbage collector.

torch and sentence-transformers make millions of objects that stay for good. The collector looks through all of them
again and again while they are imported (6.0 s of processor time instead of 4.7), and once more when Python ends (1.5 s
instead of 0.2; ``python benchmarks/startup.py --search`` measures both together).
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps the garbage collector from running, for as long as the context lasts."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_for_good(name: str) -> None:
    """Imports a module, and sets aside all objects that there are then: the collector never looks at them again.

    It is meant for commands, whose process is theirs. Where the module is there already, nothing is done.
    """
    if name not in sys.modules:
        with collector_paused():
            importlib.import_module(name)
        gc.freeze()
