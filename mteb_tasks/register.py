"""Makes mteb know this package's models, tasks and benchmarks. The startup hook calls :func:`register`.

torch is not imported. ``upstream.py`` knows how mteb is to be written to.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import upstream

#: Versions of mteb that this was written for: from the first, before the second.
FITTING = ((2, 20), (3, 0))


def register(mteb: Any) -> None:
    """Registers everything, once mteb has been imported.

    Args:
        mteb: The module.

    Warns:
        RuntimeWarning: If this version of mteb does not fit. Then nothing is registered, and mteb works as it is.
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

    upstream.add_tasks(TASKS)
    names = upstream.add_models(make_metas())
    upstream.add_benchmarks(make_benchmarks)
    upstream.find_results_by_short_names(mteb, names)
    upstream.record_what_was_used(mteb, E5VMeta)


@contextmanager
def _half_imported_set_aside() -> Iterator[None]:
    """Lets everything be imported while one of this package's own modules is in the middle of its import of mteb.

    That module is in ``sys.modules`` already, but has none of its names yet. Example, where ``recording`` comes first::

        import e5v_st.mteb_tasks.recording      recording is half imported: its first lines are run
          import mteb                           the startup hook calls register()
            import .benchmarks                  needs Recording of .recording, which is not defined yet
                                                -> set aside, so .recording is imported anew, whole
          the first import goes on, and Python gives the whole module to whoever asked for it

    The half-imported module is put back only if nothing was imported in its place.
    """
    prefix = f"{__package__}."
    half = {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith(prefix) and upstream.is_half_imported(module)
    }
    for name in half:
        del sys.modules[name]
    yield
    for name, module in half.items():
        sys.modules.setdefault(name, module)
