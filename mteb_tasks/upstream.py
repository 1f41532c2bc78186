"""What this package needs of mteb beyond its public interface: every such name stands here, and nowhere else.

mteb has no way for another package to add models, tasks or benchmarks, to find results by a short name, or to keep a
process from writing. So this module writes into mteb's registries and wraps some of its functions. Written for mteb
2.26; ``register.py`` says which versions fit, and registers nothing in others.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .ranks import rank

if TYPE_CHECKING:
    from mteb.benchmarks.benchmark import Benchmark
    from mteb.models.model_meta import ModelMeta

#: Each name as ``module:attribute.path``, with its use here and what happens without it. A test asks for each of them.
#: The last four are methods and fields that classes of this package override, where those classes stand.
PRIVATE_NAMES = (
    ("mteb.get_tasks:_TASKS_REGISTRY", "tasks are added here; otherwise `mteb run -t E5V…` does not find them"),
    ("mteb.get_tasks:TASK_LIST", "tasks are added here; otherwise `mteb.get_tasks()` does not list them"),
    ("mteb.models.get_model_meta:MODEL_REGISTRY", "models are added here; otherwise no model entry is found"),
    ("mteb.models.get_model_meta:_MODEL_RENAMES", "short names; otherwise `mteb run -m e5v` does not find its model"),
    ("mteb.benchmarks.get_benchmark:_build_registry", "otherwise `mteb run -b E5V` does not find its benchmark"),
    ("mteb.load_results:load_results", "wrapped; otherwise it does not find results by short names"),
    ("mteb:ResultCache.get_cache_paths", "wrapped; otherwise a cache does not find results by short names"),
    (
        "mteb:ResultCache.save_to_cache",
        "wrapped; otherwise it records settings that were not used, and all ranks write",
    ),
    ("mteb:AbsTask._save_task_predictions", "replaced on ranks above 0; otherwise all ranks write one file"),
    ("mteb.evaluate:_evaluate_task", "wrapped on ranks above 0; otherwise codecarbon's tracker there has no number"),
    ("mteb:AbsTask._evaluate_subset", "overridden by `Recording` and `E5VCIRRTest`; otherwise results have no details"),
    ("mteb.abstasks.retrieval:AbsTaskRetrieval._evaluate_subset", "the same, for retrieval"),
    (
        "mteb.abstasks.retrieval:AbsTaskRetrieval._support_cross_encoder",
        "overridden by `MaskedRetrieval`; otherwise a cross-encoder is let in, whose references are not masked",
    ),
    (
        "mteb.models.model_meta:ModelMeta._resolve_extras_groups",
        "overridden by `E5VMeta`; otherwise mteb wants torchvision for models that take images",
    ),
)

#: Arguments of ``encode`` that mteb passes and records, and E5-V does not use.
UNUSED = ("batch_size",)


# ---- registries ----


def add_tasks(tasks: Iterable[Any]) -> None:
    """Adds classes of tasks to those that mteb finds by name and lists; a name that it knows already stays as it is."""
    # As an attribute of mteb, get_tasks is the function of that name, and not the module that holds the registries
    module = import_module("mteb.get_tasks")
    new = [task for task in tasks if task.metadata.name not in module._TASKS_REGISTRY]
    module._TASKS_REGISTRY.update({task.metadata.name: task for task in new})
    module.TASK_LIST = (*module.TASK_LIST, *new)


def add_models(metas: Mapping[str, ModelMeta]) -> dict[str, str]:
    """Adds model entries, each to be found by its own name and by a short one.

    A short name goes to mteb's list of renamed models. In the registry itself, it would list its model twice: on the
    pages of mteb, in ``get_model_metas`` and wherever else the registry is walked. The price of a rename is a warning
    about each use of the name, which is wrong here: the short name is the one to use. So that warning, for these names
    alone, is filtered out.

    Args:
        metas: Entries by short names.

    Returns:
        Full names by the short names that differ from them.
    """
    module = import_module("mteb.models.get_model_meta")
    module.MODEL_REGISTRY.update({meta.name: meta for meta in metas.values()})
    names = {short: meta.name for short, meta in metas.items() if short != meta.name}
    module._MODEL_RENAMES.update(names)
    short = "|".join(map(re.escape, names))
    warnings.filterwarnings("ignore", f"The model '({short})' has been renamed", DeprecationWarning)
    return names


def add_benchmarks(make: Callable[[], Mapping[str, Benchmark]]) -> None:
    """Adds benchmarks, which mteb and this make when somebody asks for one: it takes a while.

    Args:
        make: Returns them by their names.
    """
    module = import_module("mteb.benchmarks.get_benchmark")
    stock = module._build_registry
    module._build_registry = lru_cache(lambda: {**stock(), **make()})


# ---- results ----


def find_results_by_short_names(mteb: Any, names: Mapping[str, str]) -> None:
    """Lets results be found by the names of ``mteb run -m``: they lie in folders of the full names.

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
    import_module("mteb.load_results").load_results = mteb.load_results


def record_what_was_used(mteb: Any, kind: type) -> None:
    """Leaves out of the recorded settings of a run what the encoder did not use.

    Args:
        mteb: The module.
        kind: The class of the model entries that this is for.
    """
    stock = mteb.ResultCache.save_to_cache

    @wraps(stock)
    def save_to_cache(self: Any, task_result: Any, model_name: Any, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("encode_kwargs")
        if given and isinstance(model_name, kind):
            kwargs["encode_kwargs"] = {key: value for key, value in given.items() if key not in UNUSED}
        stock(self, task_result, model_name, *args, **kwargs)

    mteb.ResultCache.save_to_cache = save_to_cache


# ---- several processes ----


def leave_writing_to_rank_0() -> None:
    """Keeps the other ranks from writing results and predictions, which all of them hold, and from tracking emissions.

    codecarbon tracks the whole machine, and lets one process do so at a time: another gets a tracker without a number.
    """
    if rank() == 0:
        return
    import mteb

    evaluate = import_module("mteb.evaluate")  # as an attribute of mteb, it is the function of that name
    stock = evaluate._evaluate_task

    def write_nothing(*_: Any, **__: Any) -> None:
        """Stands in for a method that writes a file."""

    @wraps(stock)
    def evaluate_task(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **{**kwargs, "co2_tracker": False})

    mteb.ResultCache.save_to_cache = write_nothing
    mteb.AbsTask._save_task_predictions = write_nothing
    evaluate._evaluate_task = evaluate_task
