"""Published models of others that use this recipe with words of their own: ask for one word, take the last state.

A row is here only if its authors' repository states the words, and the token whose state is taken. Left out for want of
that: UniME on LLaVA-OneVision (its words are not stated), and the LCO models, whose Qwen2.5-Omni is no family here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a published model is asked.

    Attributes:
        name: Of this row.
        ids: Hub ids.
        prompts: Its templates by ``"text"``, ``"image"`` and ``"composed"``, as far as its authors state them.
        suffix: What stands behind the chat format: the state of its last token is taken.
        source: Where the authors say so.
    """

    name: str
    ids: tuple[str, ...]
    prompts: Mapping[str, str]
    source: str
    suffix: str = ""


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "unime-llava-1.6",
        ("DeepGlint-AI/UniME-LLaVA-1.6-7B",),
        {
            "text": "<sent>\nSummary above sentence in one word:",
            "image": "<image>\nSummary above image in one word:",
        },
        "deepglint/UniME, README.md and self_evaluate/utils/utils.py",
    ),
    Recipe(
        "lamra-ret",
        ("code-kunkun/LamRA-Ret", "code-kunkun/LamRA-Ret-Qwen2.5VL-7b"),
        {
            "text": "<sent>\nSummarize above sentence in one word: ",
            "image": "<image>\nSummarize above image in one word: ",
            "composed": "<image><sent>\nSummarize above image and sentence in one word: ",
        },
        # The assistant's turn is "<emb>.", and the state before that token is taken: that of the newline behind the
        # word assistant, with which the chat format ends
        "code-kunkun/LamRA, demo.py",
    ),
    Recipe(
        "unite",
        ("friedrichor/Unite-Base-Qwen2-VL-2B", "friedrichor/Unite-Base-Qwen2-VL-7B"),
        {
            "text": "<sent>\nSummary above sentence in one word:",
            "image": "<image>\nSummary above image in one word:",
            "composed": "<image><sent>\nSummary above sentence and image in one word:",
        },
        "friedrichor/UNITE, unite/prompt_template.py and inference_demo/inference.py",
        suffix="<|endoftext|>",
    ),
)


def find_recipe(name: str) -> Recipe:
    """Returns the row of a name; raises ValueError if there is none."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise ValueError(f"got recipe={name!r}, want one of {', '.join(repr(recipe.name) for recipe in RECIPES)}")


def recipe_of(model_id: str) -> str | None:
    """Returns the name of the row of a hub id, if there is one."""
    return next((recipe.name for recipe in RECIPES if model_id in recipe.ids), None)
