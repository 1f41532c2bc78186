"""Writes what somebody with the weights attaches to the two pull requests that bring E5-V to mteb's leaderboard.

``python -m e5v_st.mteb_tasks.pull_request MODEL RESULTS OUT``; ``docs/upstream.md`` says what to do with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from e5v_st import __version__
from e5v_st.files import write_atomically
from e5v_st.options import add_device

from .evaluate import find_meta
from .runs import META, Run, collect

#: Where mteb has the entries, and what its extra of them is called.
ENTRY, EXTRA = "mteb/models/model_implementations/e5_v.py", "e5-v"
#: As `mteb mock-run` calls its table.
MOCK_RUN = "mteb_mock_run_results.md"
#: What only this package reads in a result file.
OWN = ("details",)

_ENTRY_HEAD = """from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mteb.models.model_meta import ModelMeta, ScoringFunction

if TYPE_CHECKING:
    from mteb.models import EncoderProtocol


def e5v_loader(
    model_name: str, revision: str | None = None, device: str | None = None, **kwargs: Any
) -> EncoderProtocol:
    from e5v_st.mteb_tasks.models import load_e5v

    return load_e5v(model_name, revision, device, **kwargs)


e5_v = """


def write_entry(meta: Any) -> str:
    """Returns the file of a model's entry in mteb, whose loader is this package's.

    Args:
        meta: The model's entry here.
    """
    published = meta.model_copy(update={"extra_requirements_groups": [EXTRA]})
    code = published.to_python().replace("E5VMeta(", "ModelMeta(", 1)
    code = code.replace(f"loader={meta.loader.__name__}", "loader=e5v_loader", 1)
    return f"{_ENTRY_HEAD}{code}\n"


def copy_results(runs: list[Run], out: Path) -> int:
    """Copies result files to where mteb's repository of results has them, without what this package adds.

    Args:
        runs: Of one model or several.
        out: The copy's folder: ``results/<model>/<revision>/<task>.json`` lies in it.

    Returns:
        The number of tasks.
    """
    count = 0
    for run in runs:
        place = out / "results" / run.name.replace("/", "__").replace(" ", "_") / run.revision
        place.mkdir(parents=True, exist_ok=True)
        for file in sorted(run.folder.glob("*.json")):
            content = json.loads(file.read_text(encoding="utf8"))
            for rows in content.get("scores", {}).values() if file.name != META else ():
                for row in rows:
                    for name in OWN:
                        row.pop(name, None)
            write_atomically(place / file.name, json.dumps(content, indent=2) + "\n")
            count += file.name != META
    return count


def main(argv: list[str] | None = None) -> int:
    """Writes entry, table of mock tasks and results, and says what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as for e5v eval: e5v, a hub id, a directory")
    parser.add_argument("results", type=Path, help="folder with results of mteb run or e5v eval")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--no-mock-run", action="store_true", help="leave out the table of mteb mock-run")
    add_device(parser)
    args = parser.parse_args(argv)
    meta = find_meta(args.model)
    runs = [run for run in collect([args.results]) if run.name.split(" (")[0] == meta.name]
    if not runs:
        raise SystemExit(f"{args.results} has no results of {meta.name}: run e5v eval first")
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / Path(ENTRY).name, write_entry(meta))
    print(f"{args.out / Path(ENTRY).name}: the entry, for {ENTRY}; its extra {EXTRA!r} is e5v-st[mteb]=={__version__}")
    print(f"{args.out / 'results'}: {copy_results(runs, args.out)} tasks, for the repository of results")
    if not args.no_mock_run:
        import mteb

        checked = mteb.mock_run(meta.with_settings(store=False).load_model(args.device))
        write_atomically(args.out / MOCK_RUN, checked.to_markdown())
        print(
            f"{args.out / MOCK_RUN}: the table of mock tasks; {'all passed' if checked.all_passed else 'some failed'}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
