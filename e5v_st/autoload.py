"""The startup hook: makes E5-V's published id load in sentence-transformers, and its tasks known to mteb.

A line in ``e5v_st.pth`` (and ``e5v_st.start`` on Python 3.15) runs :func:`install` when Python starts. It imports
nothing but this module. When somebody imports sentence-transformers or mteb, the hook calls the function that
:data:`REGISTRATIONS` names. ``E5V_AUTOLOAD=0`` switches it off. A fault in it becomes a warning.
"""

import os
import sys

REGISTRATIONS = {
    "sentence_transformers.sentence_transformer.model": ("e5v_st.published", "make_published_ids_loadable"),
    "mteb": ("e5v_st.mteb_tasks.register", "register"),
}


class Finder:
    """Finds the modules of :data:`REGISTRATIONS` as Python would, and has their loader call back."""

    def __init__(self):
        self.busy = set()

    def find_spec(self, name, path=None, target=None):
        """See ``importlib.abc.MetaPathFinder``."""
        if name not in REGISTRATIONS or name in self.busy:
            return None
        from importlib.util import find_spec

        self.busy.add(name)
        try:
            spec = find_spec(name)
        finally:
            self.busy.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            _call_after(spec.loader, name)
        return spec


def _call_after(loader, name):
    stock = loader.exec_module

    def exec_module(module):
        stock(module)
        home, function = REGISTRATIONS[name]
        try:
            import importlib

            getattr(importlib.import_module(home), function)(module)
        except Exception as error:
            import warnings

            warnings.warn(
                f"E5-V could not register itself with {name}, which works without it: {error!r}. "
                "E5V_AUTOLOAD=0 switches this off.",
                RuntimeWarning,
                stacklevel=2,
            )

    loader.exec_module = exec_module


def install():
    """Puts the finder first on ``sys.meta_path``, once, unless ``E5V_AUTOLOAD`` is 0, false, no or off."""
    off = os.environ.get("E5V_AUTOLOAD", "").strip().lower() in ("0", "false", "no", "off")
    if not off and not any(isinstance(f, Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, Finder())
