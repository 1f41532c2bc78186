"""Makes mteb know this package's models, tasks and benchmarks. The startup hook calls :func:`register`.

mteb has no way for other packages to add theirs, so this writes into its registries; torch is not imported.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

#: Versions of mteb that this was written for: from the first, before the second.
FITTING = ((2, 20), (3, 0))


def register(mteb: Any) -> None:
    """Registers everything, once mteb has been imported.

    Args:
        mteb: The module.

    Warns:
        RuntimeWarning: If this version of mteb does not fit; then nothing is registered, and mteb works as it is.
    """
    version = tuple(int(part) for part in mteb.__version__.split(".")[:2])
    if not FITTING[0] <= version < FITTING[1]:
        low, high = (".".join(map(str, limit)) for limit in FITTING)
        warnings.warn(
            f"E5-V's tasks and models are not available: mteb is {mteb.__version__}, want at least {low} and below "
            f'{high}. Install one with pip install "mteb>={low},<{high}"; everything else of mteb works. '
            "E5V_AUTOLOAD=0 hides this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    with _half_imported_set_aside():
        from .benchmarks import TASKS, make_benchmarks
        from .models import E5VMeta, make_metas
        from .upstream import find_results_by_short_names, record_what_was_used

    metas = make_metas()
    # Attributes such as mteb.get_tasks are functions of the same name as the modules that hold the registries
    tasks = sys.modules["mteb.get_tasks"]
    models = sys.modules["mteb.models.get_model_meta"]
    shelves = sys.modules["mteb.benchmarks.get_benchmark"]

    new = [task for task in TASKS if task.metadata.name not in tasks._TASKS_REGISTRY]
    tasks._TASKS_REGISTRY.update({task.metadata.name: task for task in new})
    tasks.TASK_LIST = (*tasks.TASK_LIST, *new)
    models.MODEL_REGISTRY.update({meta.name: meta for meta in metas.values()})
    names = {short: meta.name for short, meta in metas.items() if short != meta.name}
    models._MODEL_RENAMES.update(names)
    find_results_by_short_names(mteb, names)
    record_what_was_used(mteb, E5VMeta)
    stock = shelves._build_registry  # mteb builds its benchmarks when somebody asks for one, which takes a while
    shelves._build_registry = lru_cache(lambda: {**stock(), **make_benchmarks()})


@contextmanager
def _half_imported_set_aside() -> Iterator[None]:
    """Lets everything be imported when it is one of this package's own modules that is just importing mteb.

    That module has none of its names yet. It is imported anew, and Python gives the new one to whoever asked for it.
    """
    prefix = f"{__package__}."
    half = {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith(prefix) and getattr(module.__spec__, "_initializing", False)
    }
    for name in half:
        del sys.modules[name]
    yield
    for name, module in half.items():
        sys.modules.setdefault(name, module)
