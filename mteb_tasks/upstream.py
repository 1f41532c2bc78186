"""What this package needs of mteb beyond its public interface: every such name stands here, and nowhere else.

mteb has no way for another package to add models, tasks or benchmarks, to find results by a short name, or to keep a
process from writing. So this module writes into mteb's registries and wraps some of its functions. Methods that classes
of this package override stand in those classes. :data:`PRIVATE_NAMES` lists all of them, and tests ask for each. Which
versions of mteb fit stands in ``register.py``; nothing is registered in others.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

from e5v_st.model.upstream_e5v import PrivateName
from e5v_st.processes import rank

if TYPE_CHECKING:
    from types import ModuleType

    from mteb.benchmarks.benchmark import Benchmark
    from mteb.models.model_meta import ModelMeta

MTEB = "mteb 2.26"

PRIVATE_NAMES = (
    PrivateName(
        "mteb.get_tasks:_TASKS_REGISTRY",
        MTEB,
        "tasks are added to it",
        "`mteb run -t E5VSTS12` does not know the task",
    ),
    PrivateName(
        "mteb.get_tasks:TASK_LIST",
        MTEB,
        "tasks are added to it",
        "`mteb.get_tasks()` does not list the tasks",
    ),
    PrivateName(
        "mteb.models.get_model_meta:MODEL_REGISTRY",
        MTEB,
        "model entries are added to it",
        "mteb's own entry of royokong/e5-v is used, which refuses current transformers",
    ),
    PrivateName(
        "mteb.models.get_model_meta:_MODEL_RENAMES",
        MTEB,
        "short names are added to it",
        "`mteb run -m e5v` does not know the model",
    ),
    PrivateName(
        "mteb.benchmarks.get_benchmark:_build_registry",
        MTEB,
        "wrapped, so that it makes the benchmarks of this package too",
        "`mteb run -b E5V` does not know the benchmark",
    ),
    PrivateName(
        "mteb.load_results:load_results",
        MTEB,
        "wrapped, so that it takes short names; public, but wrapped by its arguments' places",
        "it finds no results of `e5v`, but those of `royokong/e5-v`",
    ),
    PrivateName(
        "mteb:ResultCache.get_cache_paths",
        MTEB,
        "wrapped, so that it takes short names; public, but wrapped by its arguments' places",
        "it finds no results of `e5v`, but those of `royokong/e5-v`",
    ),
    PrivateName(
        "mteb:ResultCache.save_to_cache",
        MTEB,
        "wrapped, so that it records what was used, and writes on rank 0 alone; public, but wrapped",
        "the record of a run says batch_size=8, which E5-V does not use; several processes write one file",
    ),
    PrivateName(
        "mteb:AbsTask._save_task_predictions",
        MTEB,
        "replaced on ranks above 0",
        "several processes write one file",
    ),
    PrivateName(
        "mteb.evaluate:_evaluate_task",
        MTEB,
        "wrapped on ranks above 0, so that they do not track emissions",
        "codecarbon lets one process track the machine; in the others, the evaluation ends with an AttributeError",
    ),
    PrivateName(
        "mteb:AbsTask._evaluate_subset",
        MTEB,
        "overridden by `recording.Recording`, which looks at what the model returns",
        "results have no details for the report",
    ),
    PrivateName(
        "mteb.abstasks.retrieval:AbsTaskRetrieval._evaluate_subset",
        MTEB,
        "overridden by `recording.Recording`, and by `cir.E5VCIRRTest`, which writes files for a server",
        "results have no details, references are not masked, and no files are written",
    ),
    PrivateName(
        "mteb.abstasks.retrieval:AbsTaskRetrieval.task_specific_scores",
        MTEB,
        "wrapped by `e5v eval`, so that mteb's own tasks keep the score of each query; public, but wrapped",
        "the report has no intervals for them",
    ),
    PrivateName(
        "mteb.abstasks.retrieval:AbsTaskRetrieval._support_cross_encoder",
        MTEB,
        "overridden by `cir.MaskedRetrieval`, which masks what an encoder finds",
        "a cross-encoder is taken, whose references are not masked",
    ),
    PrivateName(
        "mteb.models.model_meta:ModelMeta._resolve_extras_groups",
        MTEB,
        "overridden by `models.E5VMeta`, which needs nothing beyond this package",
        "mteb wants torchvision for a model that takes images",
    ),
    PrivateName(
        "importlib._bootstrap:_load_unlocked(_initializing)",
        "Python 3.11",
        "says that a module is in the middle of its import",
        "if a module of this package is the first to import mteb, its tasks are not registered",
    ),
)

#: Arguments of ``encode`` that mteb passes and records, and E5-V does not use.
UNUSED = ("batch_size",)


def is_half_imported(module: ModuleType) -> bool:
    """Whether a module is in the middle of its own import, so that some of its names are missing."""
    return getattr(module.__spec__, "_initializing", False)


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


def keep_scores_of_queries() -> None:
    """Has mteb's own retrieval tasks keep the main score of each query, for intervals; tasks with more keep theirs."""
    from .recording import scores_of_queries

    kind = import_module("mteb.abstasks.retrieval").AbsTaskRetrieval
    if hasattr(kind.task_specific_scores, "__wrapped__"):
        return
    stock = kind.task_specific_scores

    @wraps(stock)
    def task_specific_scores(
        self: Any, scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str
    ) -> dict[str, Any]:
        found = stock(self, scores, qrels, results, hf_split, hf_subset)
        queries = scores_of_queries(self.metadata.main_score, scores)
        return {**found, "details": {"queries": queries}} if queries else found

    kind.task_specific_scores = task_specific_scores


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
