"""Runs a command in a process that a test can kill, without paying for its imports each time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

#: Kills of a command in a test; ``E5V_NIGHTLY=1`` kills more often.
KILLS = 50 if os.environ.get("E5V_NIGHTLY") == "1" else 5

#: Imported once, by the process that those of the commands are forked from.
_PRELOAD = [
    "datasets",
    "e5v_st.cli",
    "e5v_st.model.modeling_e5v",
    "e5v_st.mteb_tasks.encoder",
    "e5v_st.training.output",
    "e5v_st.training.examples",
    "e5v_st.training.model",
    "e5v_st.training.train_nli",
    "e5v_st.training.trainer",
    "matplotlib.pyplot",
    "mteb",
    "peft",
    "sentence_transformers",
    "sentence_transformers.sentence_transformer.trainer",
]


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow over so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def start(main: Callable[..., Any], words: list[str], variables: dict[str, str] | None = None) -> Any:
    """Starts ``main(words)`` in a process of its own, whose exit code is what it returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=_run, args=(main, words, variables or {}))
    process.start()
    return process


def _run(main: Callable[..., Any], words: list[str], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    sys.argv = ["command", *words]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        raise SystemExit(main(words))


def run(main: Callable[..., Any], words: list[str], variables: dict[str, str] | None = None) -> float:
    """Runs ``main(words)`` to its end, which must be good; returns the seconds that it took."""
    start(len, []).join()  # the imports are not to be measured
    began = time.monotonic()
    process = start(main, words, variables)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def kill_at_random(
    main: Callable[..., Any], words: list[str], seconds: float, seed: int, variables: dict[str, str] | None = None
) -> Iterator[bool]:
    """Starts ``main(words)`` :data:`KILLS` times and kills it (-9) within so many seconds.

    Yields:
        Whether it was still at work then.
    """
    dice = random.Random(seed)
    for _ in range(KILLS):
        process = start(main, words, variables)
        process.join(dice.uniform(0, seconds))
        alive = process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        yield alive
