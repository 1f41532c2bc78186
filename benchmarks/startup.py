"""What starting costs: the startup hook, ``import e5v_st``, ``e5v --help``, and the first result of ``e5v search``.

    python benchmarks/startup.py             # the hook: medians over fresh interpreters, side by side with the hook off
    python benchmarks/startup.py --search    # help and search; both write their part of benchmarks/results/startup.json

Run the first where the package is installed from a wheel: the finder of an editable install takes longer than the hook.

The second makes an index of six images with the embedded model, as a folder and as a table, and takes turns: importing
torch and sentence-transformers in a fresh interpreter, and a search from its start to its first line of output, on a
warm disk. Time by the clock ends at that line. Processor time ends with the process, and is what a quiet machine would
take whatever else is running.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNS = 21
SEARCHES = 5
OUT = Path(__file__).parent / "results" / "startup.json"
#: What the script ``e5v`` runs.
E5V = ["-c", "from e5v_st.cli import main; raise SystemExit(main())"]
IMPORTS = "import torch and sentence-transformers"
FOLDER, TABLE = "`e5v search` in a folder of `e5v embed`", "`e5v search` in a table of `e5v index`"


# ---- the hook ----


def milliseconds(*words: str, **variables: str) -> float:
    """Median wall time of a fresh interpreter with these arguments."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run(*words, **variables)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def run(*words: str, **variables: str) -> str:
    """Runs a fresh interpreter with these arguments, away from the checkout; returns what it printed."""
    command, env = [sys.executable, *words], {**os.environ, **variables}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=tempfile.gettempdir())
    return done.stdout


def hook_alone() -> float:
    """Median time in milliseconds that the hook itself takes inside a fresh interpreter."""
    code = (
        "import time; t = time.perf_counter(); import e5v_st.autoload as a; a.install(); print(time.perf_counter() - t)"
    )
    return statistics.median(1000 * float(run("-c", code, E5V_AUTOLOAD="0")) for _ in range(RUNS))


def measure_hook() -> dict[str, Any]:
    """Returns what Python's start takes with the hook and without it."""
    return {
        "interpreter_hook_off_ms": milliseconds("-c", "pass", E5V_AUTOLOAD="0"),
        "interpreter_hook_on_ms": milliseconds("-c", "pass", E5V_AUTOLOAD="1"),
        "hook_import_and_install_ms": hook_alone(),
        "import_e5v_st_ms": milliseconds("-c", "import e5v_st", E5V_AUTOLOAD="0"),
    }


# ---- the first result ----


def make_indexes(root: Path) -> tuple[Path, Path]:
    """Writes six images, and indexes them as a folder and as a table."""
    import numpy as np
    from random_model import SHAPES, draw_picture

    images = root / "images"
    images.mkdir()
    noise = np.random.default_rng(0)
    for number, size in enumerate(SHAPES[:6]):
        draw_picture(noise, size).save(images / f"{number}.png")
    folder, table = root / "index", root / "images.lance"
    run(*E5V, "embed", str(images), str(folder), "--model", "e5v-tiny")
    run(*E5V, "index", str(images), str(table), "--model", "e5v-tiny")
    return folder, table


def start(words: list[str], autoload: str = "1") -> tuple[float, float]:
    """Starts a fresh interpreter, and waits for its end.

    Args:
        words: Its arguments.
        autoload: ``"0"`` keeps the startup hook out.

    Returns:
        Seconds by the clock to its first line of output, and its processor time in seconds.
    """
    # Unbuffered, as a terminal shows a line when it is printed
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "E5V_AUTOLOAD": autoload}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, cwd=tempfile.gettempdir()
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        process.stdout.read()
    if process.returncode or not line.strip():
        raise RuntimeError(f"{' '.join(words)} failed: run it by hand")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_search() -> dict[str, Any]:
    """Times help, the imports alone, and searches, in turns; prints a table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, table = make_indexes(Path(temporary))
        ways = {
            IMPORTS: (["-c", "import torch, sentence_transformers; print('done')"], "0"),
            FOLDER: ([*E5V, "search", str(folder), "a red ball"], "1"),
            TABLE: ([*E5V, "search", str(table), "a red ball"], "1"),
        }
        for arguments in ways.values():
            start(*arguments)  # the disk is warm from here on
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(SEARCHES):
            for way, arguments in ways.items():
                times[way].append(start(*arguments))
    rows = {}
    for way, pairs in times.items():
        clock, processor = (statistics.median(values) for values in zip(*pairs, strict=True))
        rows[way] = {"first_line_s": clock, "processor_s": processor}
    for row in rows.values():
        row["times_of_the_imports"] = row["first_line_s"] / rows[IMPORTS]["first_line_s"]
        row["processor_times_of_the_imports"] = row["processor_s"] / rows[IMPORTS]["processor_s"]
    return {"help_ms": milliseconds(*E5V, "--help"), "search": rows, "search_runs": SEARCHES}


def cells(row: dict[str, float]) -> str:
    """Returns a row of the table."""
    clock = f"{row['first_line_s']:.1f} | {row['times_of_the_imports']:.2f}"
    return f"{clock} | {row['processor_s']:.1f} | {row['processor_times_of_the_imports']:.2f}"


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="time help and search instead of the hook")
    args = parser.parse_args()
    result = json.loads(OUT.read_text(encoding="utf8")) if OUT.exists() else {}
    result |= {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    found = measure_search() if args.search else measure_hook()
    for name, value in found.items():
        if name == "search":
            for way, row in value.items():
                print(f"| {way} | {cells(row)} |")
        else:
            print(f"{name:32} {value:.2f}" if isinstance(value, float) else f"{name:32} {value}")
    OUT.write_text(json.dumps(result | found, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
