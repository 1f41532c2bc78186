"""What mteb's results need to know of this package's models: their short names, and what an encoder made use of."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import wraps
from typing import Any

#: Arguments of ``encode`` that mteb passes and records, and E5-V does not use.
UNUSED = ("batch_size",)


def find_results_by_short_names(mteb: Any, names: Mapping[str, str]) -> None:
    """Has results be found by the names of ``mteb run -m``: they lie in folders of the full names.

    Args:
        mteb: The module.
        names: Full names by short ones.
    """

    def full(models: Any) -> Any:
        return models and [names.get(own, own) if isinstance(own, str) else own for own in models]

    def taking_short_names(stock: Any, place: int) -> Any:
        @wraps(stock)
        def found(*args: Any, **kwargs: Any) -> Any:
            if len(args) > place:
                return stock(*args[:place], full(args[place]), *args[place + 1 :], **kwargs)
            return stock(*args, **{**kwargs, "models": full(kwargs.get("models"))})

        return found

    results = mteb.ResultCache
    results.get_cache_paths = taking_short_names(results.get_cache_paths, 1)
    mteb.load_results = taking_short_names(mteb.load_results, 2)
    sys.modules["mteb.load_results"].load_results = mteb.load_results


def record_what_was_used(mteb: Any, kind: type) -> None:
    """Leaves out of the recorded settings of a run what the encoder did not use.

    Args:
        mteb: The module.
        kind: Class of the model entries that this is for.
    """
    stock = mteb.ResultCache.save_to_cache

    @wraps(stock)
    def save_to_cache(self: Any, task_result: Any, model_name: Any, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("encode_kwargs")
        if given and isinstance(model_name, kind):
            kwargs["encode_kwargs"] = {key: value for key, value in given.items() if key not in UNUSED}
        stock(self, task_result, model_name, *args, **kwargs)

    mteb.ResultCache.save_to_cache = save_to_cache
