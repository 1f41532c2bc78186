"""Models that are known by a name: E5-V's published checkpoints, and the small model that comes with this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .saved import load_later, read_modules

if TYPE_CHECKING:
    from torch import nn

#: Repositories that hold an E5-V but no ``modules.json``. The startup hook makes exactly these load by their id.
PUBLISHED_IDS = frozenset({"royokong/e5-v"})

#: The small model that comes with this package, and the name that ``e5v_st.load`` knows it by.
TINY = Path(__file__).parent / "tiny"
TINY_NAME = "e5v-tiny"


def load_modules(
    path_or_id: str,
    *,
    settings: Mapping[str, Any] | None = None,
    family: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> list[nn.Module]:
    """Returns the modules of an E5-V.

    A saved model has those that its ``modules.json`` names. A published checkpoint has the transformer, last-token
    pooling and normalisation.

    Args:
        path_or_id: A directory or hub id; see ``E5VTransformer``.
        settings: ``image_layout`` and ``max_image_tokens``. ``None`` stands for what the model was saved with, and for
            the family's default in a published checkpoint.
        family: ``generic``, ``chat_format`` and ``recipe``, for a published checkpoint; see ``E5VTransformer``.
        **kwargs: Arguments of ``E5VTransformer.load``.

    Raises:
        ValueError: If the model cannot be loaded as an E5-V, the layout is unknown, or the model has modules that an
            E5-V does not have.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    from .model.modeling_e5v import E5VTransformer

    named = read_modules(path_or_id, **hub_places(kwargs))
    chosen = {name: value for name, value in (settings or {}).items() if value is not None}
    known = {name: value for name, value in (family or {}).items() if value is not None}
    transformer = E5VTransformer.load(path_or_id, init_defaults={**chosen, **known}, **kwargs)
    for name, value in chosen.items():
        setattr(transformer, name, value)  # what a model was saved with goes before the defaults
    if named:
        return [transformer, *load_later(path_or_id, named, **hub_places(kwargs))]
    return [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()]


def hub_places(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of ``SentenceTransformer``'s arguments that say where a repository's files are."""
    names = ("cache_folder", "local_files_only", "revision", "token")
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def make_published_ids_loadable(module: Any) -> None:
    """Makes ``SentenceTransformer(id, trust_remote_code=True)`` load the published ids as E5-V.

    sentence-transformers calls ``_load_default_modules`` only for a repository without ``modules.json``. It would put
    mean pooling and no prompt on the checkpoint. The startup hook calls this function.

    Args:
        module: ``sentence_transformers.sentence_transformer.model``, just imported.
    """
    stock = module.SentenceTransformer._load_default_modules

    def load_default_modules(self: Any, model_name_or_path: str, **kwargs: Any) -> Any:
        if model_name_or_path not in PUBLISHED_IDS or not kwargs.get("trust_remote_code"):
            return stock(self, model_name_or_path, **kwargs)
        from .model.prompts_e5v import PROMPTS

        modules = load_modules(model_name_or_path, **kwargs)
        self.prompts = {**PROMPTS, **{name: prompt for name, prompt in self.prompts.items() if prompt}}
        self.model_card_data.set_base_model(model_name_or_path, revision=kwargs.get("revision"))
        return modules, {}

    module.SentenceTransformer._load_default_modules = load_default_modules
