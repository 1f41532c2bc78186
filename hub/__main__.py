"""``python -m hub COMMAND`` in a checkout, ``python -m e5v_st.hub COMMAND`` everywhere: the hub's part of ``e5v``."""

from __future__ import annotations

from collections.abc import Sequence

from e5v_st import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the hub's commands; returns the exit code."""
    names = [name for name, (module, _) in cli.COMMANDS.items() if module.startswith("e5v_st.hub.")]
    return cli.main(argv, program="python -m hub", names=names)


if __name__ == "__main__":
    raise SystemExit(main())
