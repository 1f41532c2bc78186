"""mteb knows what is registered, and goes on without it where it must."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings

import mteb
import pytest

from e5v_st.mteb_tasks.benchmarks import TASKS
from e5v_st.mteb_tasks.register import register

NAMES = {
    "E5VFlickr30kT2IRetrieval", "E5VFlickr30kI2TRetrieval", "E5VCOCOT2IRetrieval", "E5VCOCOI2TRetrieval",
    "E5VFlickr30kI2IRetrieval", "E5VCOCOI2IRetrieval", "E5VFashionIQRetrieval", "E5VCIRRRetrieval", "E5VCIRRTest",
    "E5VSTS12", "E5VSTS13", "E5VSTS14", "E5VSTS15", "E5VSTS16", "E5VSTSBenchmark", "E5VSICKR",
}  # fmt: skip
TINY = {
    "E5VEmojiT2IRetrieval", "E5VEmojiI2TRetrieval", "E5VEmojiI2IRetrieval", "E5VEmojiComposedRetrieval", "E5VEmojiSTS",
}  # fmt: skip


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.stdout.strip(), done.stderr


def test_benchmarks_hold_what_the_paper_reports():
    assert {task.metadata.name for task in mteb.get_benchmark("E5V").tasks} == NAMES
    assert {task.metadata.name for task in mteb.get_benchmark("E5V(tiny)").tasks} == TINY
    assert {"E5V", "E5V(tiny)", "MTEB(eng, v2)"} <= {benchmark.name for benchmark in mteb.get_benchmarks()}


def test_tasks_are_found_by_name_and_by_filter():
    assert {task.metadata.name for task in mteb.get_tasks()} >= NAMES | TINY
    assert mteb.get_task("E5VCIRRRetrieval").metadata.category == "it2i"


def test_models_are_found_by_their_short_names_and_listed_once():
    assert mteb.get_model_meta("e5v").name == "royokong/e5-v"
    assert mteb.get_model_meta("e5v-paper").loader_kwargs["image_layout"] == "paper"
    names = [meta.name for meta in mteb.get_model_metas()]
    assert names.count("royokong/e5-v") == 1
    assert mteb.get_model_meta("royokong/e5-v").loader.__module__ == "e5v_st.mteb_tasks.models"


def test_the_hook_registers_without_torch_and_can_be_switched_off():
    code = "import mteb, sys; print('E5VSTS12' in {t.metadata.name for t in mteb.get_tasks()}, 'torch' in sys.modules)"
    assert python(code)[0] == "True False"
    assert python(code, E5V_AUTOLOAD="0")[0] == "False False"


def test_registration_takes_less_than_a_fifth_of_a_second():
    code = (
        "import mteb, time; start = time.perf_counter();"
        "from e5v_st.mteb_tasks.register import register; register(mteb);"
        "print(time.perf_counter() - start)"
    )
    assert float(python(code, E5V_AUTOLOAD="0")[0]) < 0.2


def test_registering_twice_changes_nothing():
    before = len(mteb.get_tasks())
    register(mteb)
    assert len(mteb.get_tasks()) == before


@pytest.mark.parametrize("version", ["2.1.0", "3.0.1"])
def test_a_version_that_does_not_fit_gets_one_clear_warning(version):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        register(types.SimpleNamespace(__version__=version))
    assert len(caught) == 1
    assert f"mteb is {version}" in str(caught[0].message)
    assert "pip install" in str(caught[0].message)


def test_another_model_goes_by_its_own_name(small):
    code = (
        "import mteb; own, published = map(mteb.get_model_meta, ('e5v', 'royokong/e5-v'));"
        "print(own.name, len(own.revision), published.revision[:7])"
    )
    assert python(code, E5V_MODEL=str(small))[0] == "local/small 40 0c1f226"


@pytest.mark.parametrize("module", ["recording", "encoder"])
def test_any_module_may_be_the_first_to_import_mteb(module):
    code = (
        f"import e5v_st.mteb_tasks.{module} as first, sys, mteb;"
        f"print(first is sys.modules['e5v_st.mteb_tasks.{module}'], mteb.get_task('E5VSTS12').metadata.name)"
    )
    printed, warned = python(code)
    assert printed == "True E5VSTS12"
    assert "RuntimeWarning" not in warned


def test_every_task_is_registered_once():
    names = [task.metadata.name for task in TASKS]
    assert len(names) == len(set(names)) == len(NAMES | TINY)
