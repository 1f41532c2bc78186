"""Types: what a type checker sees of the public names, and the baseline of mypy's errors."""

from __future__ import annotations

import re

import pytest
from typing_baseline import PUBLIC, ROOT, check, count, excess, read_baseline


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    return count(check("-p", "e5v_st"))


def test_no_file_has_more_type_errors_than_the_baseline(found):
    assert excess(found, read_baseline()) == []


def test_the_baseline_only_shrinks(found):
    """Errors that are mended leave the baseline: `python tests/typing_baseline.py --write`."""
    assert excess(read_baseline(), found) == []


def test_the_public_modules_have_no_type_errors(found):
    assert [file for file in PUBLIC if file in found or file in read_baseline()] == []
    assert all((ROOT / file).is_file() for file in PUBLIC)


def test_more_errors_than_allowed_are_named():
    lines = ["hub/push.py:3: error: Argument 1 is not right  [arg-type]", "hub/push.py:3: note: See the manual"]
    assert count(lines) == {"hub/push.py": {"arg-type": 1}}
    assert excess(count(lines * 2), {"hub/push.py": {"arg-type": 1}}) == [("hub/push.py", "arg-type", 2, 1)]
    assert excess(count(lines), {"hub/push.py": {"arg-type": 1, "misc": 4}}) == []


def test_a_type_checker_sees_the_public_names():
    program = "\n".join(["import e5v_st", *(f"reveal_type(e5v_st.{name})" for name in e5v_names()), ""])
    revealed = [re.search('"(.*)"', line)[1] for line in check("-c", program) if "Revealed type" in line]
    types = dict(zip(e5v_names(), revealed, strict=True))
    assert "path_or_id: str | pathlib.Path, *, backbone: str | None" in types["load"]
    assert types["load"].endswith("sentence_transformers.sentence_transformer.model.SentenceTransformer")
    assert "model.modeling_e5v.E5VTransformer" in types["E5VTransformer"]
    assert types["PROMPTS"] == "dict[str, str]"
    assert [name for name, type_ in types.items() if type_ in ("object", "Any")] == []


def e5v_names() -> list[str]:
    import e5v_st

    return [name for name in e5v_st.__all__ if not name.startswith("_")]
