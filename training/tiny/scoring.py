"""Scores of an exported model, in plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import Row, pictures, read
from .model import PATCH
from .tokenizer import ROWS

if TYPE_CHECKING:
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor


def open_plain(folder: Path) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """Opens the checkpoint with transformers alone, with the two repairs that the published format needs.

    Raises:
        ValueError: If the file lacks a weight, or has one too many.
    """
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    model, report = LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: value for key, value in report.items() if value}
    if wrong:
        raise ValueError(f"{folder} does not hold exactly this model's weights: {wrong}")
    model.resize_token_embeddings(ROWS + 1, mean_resizing=False)
    processor = LlavaNextProcessor.from_pretrained(folder)
    processor.patch_size, processor.vision_feature_select_strategy = PATCH, "default"
    processor.num_additional_image_tokens = 1
    return model.eval(), processor


def embed(model: Any, processor: Any, prompt: str, items: Sequence[tuple[Any, str]], batch: int = 64) -> torch.Tensor:
    """Embeds (image or None, text) pairs with one of E5-V's prompts: (n, 192), float32, L2-normalised."""
    import torch
    from torch.nn import functional as F

    from e5v_st.model.prompts_e5v import PROMPTS, render

    found = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        texts = [render(PROMPTS[prompt], sentence=sentence) for _, sentence in part]
        images = [image for image, _ in part if image is not None]
        inputs = processor(text=texts, images=images or None, return_tensors="pt", padding=True)
        with torch.no_grad():
            states = model.model(**inputs).last_hidden_state
        found.append(F.normalize(states[:, -1].float(), dim=-1))  # padded on the left
    return torch.cat(found)


def recalls(scores: torch.Tensor, targets: Sequence[int]) -> dict[str, float]:
    """Returns R@1, R@5 and R@10 in percent; a tie counts against the model.

    Raises:
        ValueError: If a score is not a number.
    """
    import torch

    if scores.isnan().any():
        raise ValueError("scores that are not numbers: the model is broken, no recall can be given")
    right = scores[torch.arange(len(targets)), torch.as_tensor(targets)]
    ranks = (scores >= right[:, None]).sum(1)
    return {f"R@{k}": round(100 * (ranks <= k).float().mean().item(), 2) for k in (1, 5, 10)}


def evaluate(model: Any, processor: Any, splits: Sequence[str]) -> dict[str, Any]:
    """Scores retrieval of images by name and back, composed retrieval and text pairs, with the chance levels."""
    emoji = read("emoji.parquet")
    where = {row["id"]: i for i, row in enumerate(emoji)}
    images = embed(model, processor, "image", [(image, "") for image in pictures(emoji)])
    result: dict[str, Any] = {}
    for split in splits:
        at = [i for i, row in enumerate(emoji) if row["split"] == split and row["gallery"]]
        names = embed(model, processor, "text", [(None, emoji[i]["name"]) for i in at])
        scores, targets = names @ images[at].T, range(len(at))
        result[f"{split}/text-to-image"] = {"gallery": len(at), **recalls(scores, targets)}
        result[f"{split}/image-to-text"] = {"gallery": len(at), **recalls(scores.T, targets)}
        triplets = [row for row in read("composed.parquet") if row["split"] == split]
        result |= {
            f"{split}/{k}": v for k, v in composed_scores(model, processor, triplets, emoji, where, images).items()
        }
    pairs = [row for row in read("text_pairs.parquet") if row["split"] != "train"]
    for split, kind in sorted({(row["split"], row["kind"]) for row in pairs}):
        some = [row for row in pairs if (row["split"], row["kind"]) == (split, kind)]
        queries = embed(model, processor, "text", [(None, row["query"]) for row in some])
        targets = embed(model, processor, "text", [(None, row["target"]) for row in some])
        result[f"{split}/text {kind}"] = {"gallery": len(some), **recalls(queries @ targets.T, range(len(some)))}
    return result


def composed_scores(
    model: Any, processor: Any, triplets: list[Row], emoji: list[Row], where: dict[str, int], images: torch.Tensor
) -> dict[str, Any]:
    """Scores composed retrieval among the target's relatives and in the whole gallery, reference masked in both.

    ``reference only`` is the same with the reference's image as the query, which never reads the words.
    """
    import torch

    references = [where[t["reference"]] for t in triplets]
    targets = [where[t["target"]] for t in triplets]
    image_of = pictures([emoji[i] for i in references])
    items = [(image, t["text"]) for image, t in zip(image_of, triplets, strict=True)]
    gallery = embed(model, processor, "cirr-gallery", [(image, "") for image in pictures(emoji)])
    queries = {"composed": embed(model, processor, "cirr-query", items), "reference only": gallery[references]}
    family = torch.full((len(triplets), len(emoji)), float("-inf"))
    for i, target in enumerate(targets):
        family[i, [where[k] for k in emoji[target]["family"]]] = 0.0
    family[torch.arange(len(triplets)), references] = float("-inf")
    chance = (1 / family.isfinite().sum(1)).mean().item()
    result = {}
    for name, query in queries.items():
        scores = query @ gallery.T
        scores[torch.arange(len(triplets)), references] = float("-inf")
        among = recalls(scores + family, targets)["R@1"]
        result[name] = {"queries": len(triplets), "R@1 among relatives": among, **recalls(scores, targets)}
    result["composed"]["chance among relatives"] = round(100 * chance, 2)
    return result
