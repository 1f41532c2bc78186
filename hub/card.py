"""The model card: one template for adapters, merged models and exported ones.

:func:`write_card` collects what is known, from four places: the model's folder, the run's folder with its own card,
mteb's result files, and the caller (:class:`Card`). Each ``_values_of`` function returns a part of the template's
values; ``card.md.jinja`` decides about the words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.files import hash_file, read_json
from e5v_st.saved import MODEL_SETTINGS

from .folders import ADAPTER_CONFIG, RUN_FILES, names_repository
from .results import Measured, read_results

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).parent / "card.md.jinja"

#: What a training run leaves: its arguments, scores by name ``before`` and ``after``, and a plot.
RECIPE, EVALUATION, PLOT = RUN_FILES

#: A merged model's metadata keeps here which adapter is in it.
ADAPTER_KEY = "merged_adapter"

TAGS = (
    "sentence-transformers",
    "sentence-similarity",
    "feature-extraction",
    "multimodal",
    "image-text-retrieval",
    "composed-image-retrieval",
    "e5-v",
)


@dataclass
class Card:
    """What a card says that does not stand in the model's folder.

    Attributes:
        base: Hub id (or path) of the model that this one was made from.
        base_revision: Commit or branch of the base.
        adapter: Hub id or path of the adapter that was merged into the base.
        repo_id: Where the model goes; if it goes nowhere, the card has the folder's name.
        license: A licence identifier of the hub.
        ask_base: Whether the licence may be that of the base's card if nothing else names one; this may ask the hub.
        language: Language codes.
        results: A folder with mteb's result files.
        results_model: ``NAME`` or ``NAME@REVISION`` of the results to take, if the folder has those of several models.
    """

    base: str | None = None
    base_revision: str | None = None
    adapter: str | None = None
    repo_id: str | None = None
    license: str | None = None
    ask_base: bool = False
    language: list[str] = field(default_factory=lambda: ["en"])
    results: Path | None = None
    results_model: str | None = None


@dataclass(frozen=True)
class _Origin:
    """What a model was made from.

    Attributes:
        base: Hub id or path of the base, if it is known.
        adapter: Hub id or path of the adapter that is merged into it, if there is one.
        is_adapter: Whether the folder holds an adapter alone.
    """

    base: str | None
    adapter: str | None
    is_adapter: bool

    def metadata(self) -> dict[str, Any]:
        """Returns what the card's metadata says of it; a base that is not on the hub stays out."""
        public = {ADAPTER_KEY: public_name(self.adapter)} if self.adapter else {}
        if self.base is None or not names_repository(self.base):
            return public
        relation = "adapter" if self.is_adapter else "finetune" if self.adapter else None
        return {"base_model": self.base, "base_model_relation": relation, **public}

    def values(self) -> dict[str, Any]:
        """Returns what the template says of it."""
        return {
            "base": self.base and public_name(self.base),
            "adapter": self.adapter and public_name(self.adapter),
            "is_adapter": self.is_adapter,
        }


def write_card(folder: Path, card: Card, run: Path | None = None) -> None:
    """Writes ``README.md``.

    Args:
        folder: The model, with its sentence-transformers files.
        card: What the folder does not say.
        run: The folder of the training run, if it is another one. Its ``README.md`` may name licence, base and data.
    """
    from huggingface_hub import ModelCard

    run = run or folder
    known = _known_data(run)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    origin = _Origin(_find_base(card, known), card.adapter or known.get(ADAPTER_KEY), is_adapter)
    measured = read_results(card.results, run, card.repo_id, card.results_model) if card.results else None
    name = card.repo_id or folder.name
    content = ModelCard.from_template(
        _make_metadata(name, card, known, origin, measured),
        template_path=str(TEMPLATE),
        name=name,
        **origin.values(),
        **_values_of_model(folder),
        **_values_of_run(run, is_adapter),
        **_values_of_scores(measured),
    )
    (folder / "README.md").write_text(str(content), encoding="utf8")


# ---- the metadata ----


def _make_metadata(
    name: str, card: Card, known: dict[str, Any], origin: _Origin, measured: Measured | None
) -> ModelCardData:
    """Makes the YAML head of a card; ``known`` is that of the run's own card."""
    from huggingface_hub import ModelCardData

    tags = [*TAGS, *(["peft", "lora"] if origin.is_adapter else []), *(["mteb"] if measured else [])]
    return ModelCardData(
        language=card.language,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        datasets=known.get("datasets"),
        tags=tags,
        **_find_license(card, known, origin.base),
        **origin.metadata(),
        **({"model_name": name.split("/")[-1], "eval_results": _eval_results(measured.scores)} if measured else {}),
    )


def _eval_results(scores: list[dict[str, Any]]) -> Any:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="sentence-similarity",
            dataset_type=score["task"],
            dataset_name=f"MTEB {score['task']} ({score['subset']})",
            dataset_config=score["subset"],
            dataset_split=score["split"],
            dataset_revision=score["revision"],
            metric_type="main_score",
            metric_value=score["score"],
        )
        for score in scores
    ]


def _find_base(card: Card, known: dict[str, Any]) -> str | None:
    """Returns the base's name.

    A path tells readers nothing, and the base of a copy of a merged model is not the model that was copied. In both
    cases the model's own card may know more.
    """
    said = known.get("base_model")
    said = said[0] if isinstance(said, list) and said else said
    if not isinstance(said, str) or not names_repository(said):
        return card.base
    copied = card.adapter is None and ADAPTER_KEY in known
    return card.base if card.base and names_repository(card.base) and not copied else said


def _license_in(data: dict[str, Any]) -> dict[str, Any]:
    """Returns what a card's metadata says of the licence: its identifier, and the name and address of a special one."""
    if data.get("license") in (None, "", [], "unknown"):
        return {}
    link = data.get("license_link")
    known = {**data, "license_link": link if str(link).startswith("http") else None}  # others lead nowhere from here
    return {name: known[name] for name in ("license", "license_name", "license_link") if known.get(name)}


def _find_license(card: Card, known: dict[str, Any], base: str | None) -> dict[str, Any]:
    """Returns the licence: the one that is asked for, that of the run's own card, or that of the base's card."""
    if card.license:
        return {"license": card.license}
    found = _license_in(known)
    if not found and card.ask_base and base:
        found = license_of(base, card.base_revision if base == card.base else None)
    return found or {"license": "unknown"}


def license_of(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Returns what the card of a model (a directory, or a hub id) says of its licence.

    Nothing depends on it, so whatever goes wrong is not an error: then nothing is known.
    """
    from huggingface_hub import hf_hub_download

    try:
        folder = (
            Path(model) if Path(model).is_dir() else Path(hf_hub_download(model, "README.md", revision=revision)).parent
        )
        return _license_in(_known_data(folder))
    except Exception:
        return {}


def _known_data(folder: Path) -> dict[str, Any]:
    """Returns the metadata of the card that a folder has already."""
    from huggingface_hub import ModelCard

    if not (folder / "README.md").is_file():
        return {}
    with _naming(folder / "README.md"):
        return ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()


# ---- what the template says ----


def public_name(name: str) -> str:
    """Returns a hub id as it is, and of a path the last part: nobody else needs to know where folders lie."""
    return name if names_repository(name) else Path(name).name


def _values_of_model(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / "sentence_bert_config.json")
    own = read_json(folder / MODEL_SETTINGS).get("e5v") or {}  # models saved earlier have none
    return {
        **_values_of_family(folder, str(own.get("family", "llava_next")), settings),
        "native": "image_layout" not in settings,
        "image_layout": settings.get("image_layout", "upstream"),
        "dimension": read_json(folder / "1_Pooling" / "config.json")["embedding_dimension"],
        "sources": {file.name: hash_file(file) for file in sorted(folder.glob("*_e5v.py"))},
    }


def _values_of_family(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what the card says of a family; of LLaVA-NeXT, it tells the image layout in place of it."""
    from e5v_st.model.backbone_e5v import BACKBONES, GENERIC, Backbone
    from e5v_st.model.prompts_e5v import find_format

    row = next((row for row in BACKBONES if row.name == name), None)
    if name == GENERIC:
        known = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        row = Backbone(GENERIC, known.get("model_type", ""), settings["chat_format"], processor="")
    tokens = settings.get("max_image_tokens")
    if row is None or row.is_llava_next:
        return {"family": None, "image_tokens": tokens}
    return {
        "family": row,
        "chat": json.dumps(find_format(row.wrapper)),
        "image_tokens": row.image_tokens if tokens is None else tokens,
    }


def _values_of_run(run: Path, is_adapter: bool) -> dict[str, Any]:
    return {
        "recipe": _read_recipe(run / RECIPE),
        "evaluation": _read_evaluation(run / EVALUATION),
        "plot": PLOT if (run / PLOT).is_file() and is_adapter else None,
    }


def _values_of_scores(measured: Measured | None) -> dict[str, Any]:
    if measured is None:
        return {"scores": [], "measured": None, "measured_revision": None}
    return {
        "scores": measured.scores,
        "measured": public_name(measured.name),
        "measured_revision": measured.revision,
    }


def _read_recipe(file: Path) -> dict[str, Any]:
    """Returns a run's arguments, of paths only the last part."""
    import yaml

    with _naming(file):
        recipe = dict(yaml.safe_load(file.read_text(encoding="utf8")) or {}) if file.is_file() else {}
    return {name: _without_folders(value) for name, value in recipe.items() if value not in (None, "", [], {})}


def _without_folders(value: Any) -> Any:
    """Returns a value with only the last part of each path in it: folders tell of a machine and its user."""
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "..")) else value


def _read_evaluation(file: Path) -> dict[str, dict[str, Any]]:
    """Returns a run's scores by name, before and after."""
    with _naming(file):
        content = dict(read_json(file)) if file.is_file() else {}
        return {when: dict(content[when]) for when in ("before", "after") if content.get(when)}


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turns what is wrong with a file for the card into a ValueError that names it."""
    import yaml

    try:
        yield
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{file}, which the card is made from, cannot be read: mend or remove it ({error})") from None
