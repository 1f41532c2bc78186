"""What the startup hook and `import e5v_st` cost: medians over fresh interpreters, side by side with the hook off.

Run it where the package is installed from a wheel: the finder of an editable install takes longer than the hook.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 21
OUT = Path(__file__).parent / "results" / "startup.json"


def milliseconds(code: str, **variables: str) -> float:
    """Median wall time of a fresh interpreter that runs ``code``."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run(code, **variables)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def run(code: str, **variables: str) -> str:
    """Runs ``code`` in a fresh interpreter, away from the checkout; returns what it printed."""
    command, env = [sys.executable, "-c", code], {**os.environ, **variables}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=tempfile.gettempdir())
    return done.stdout


def hook_alone() -> float:
    """Median time in milliseconds that the hook itself takes inside a fresh interpreter."""
    code = (
        "import time; t = time.perf_counter(); import e5v_st.autoload as a; a.install(); print(time.perf_counter() - t)"
    )
    return statistics.median(1000 * float(run(code, E5V_AUTOLOAD="0")) for _ in range(RUNS))


def main() -> None:
    """Measures, prints a table and writes JSON."""
    result = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "interpreter_hook_off_ms": milliseconds("pass", E5V_AUTOLOAD="0"),
        "interpreter_hook_on_ms": milliseconds("pass", E5V_AUTOLOAD="1"),
        "hook_import_and_install_ms": hook_alone(),
        "import_e5v_st_ms": milliseconds("import e5v_st", E5V_AUTOLOAD="0"),
    }
    for name, value in result.items():
        print(f"{name:32} {value:.2f}" if isinstance(value, float) else f"{name:32} {value}")
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
