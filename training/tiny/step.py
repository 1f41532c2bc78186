"""One training step: its batch and its losses, which depend on the seed and the number of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .data import Data, Row, bag, mirror
from .model import augment, build_model, image_tokens, last_states, normalised
from .settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

TEMPERATURE = 0.05


def match(queries: torch.Tensor, keys: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each query's cosines with all keys at ``TEMPERATURE``; ``targets`` index the right keys."""
    from torch.nn import functional as F

    cosines = F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T
    return F.cross_entropy(cosines / TEMPERATURE, targets)


def word_loss(
    model: LlavaNextForConditionalGeneration, states: torch.Tensor, bags: list[dict[int, float]]
) -> torch.Tensor:
    """Cross entropy of the LM head's distribution at each hidden state with its bag of words."""
    import torch

    logs = model.lm_head(states).float().log_softmax(-1)
    at = [(i, token, share) for i, found in enumerate(bags) for token, share in found.items()]
    rows, tokens, shares = (torch.tensor(column) for column in zip(*at, strict=True))
    return -(logs[rows, tokens] * shares).sum() / len(bags)


class Trainer:
    """Holds what every step needs; ``losses(step)`` depends on the seed and the step alone."""

    def __init__(self, settings: Settings, data: Data, tokenizer: PreTrainedTokenizerFast) -> None:
        self.settings, self.data, self.tokenizer = settings, data, tokenizer
        self.model = build_model(settings.seed)
        self.bags = [bag(tokenizer, [(0.7, [row["name"]]), (0.3, row["keywords"])]) for row in data.rows]
        glosses = [(gloss, bag(tokenizer, [(1.0, [lemma])])) for gloss, lemma in data.glosses]
        self.glosses = [(gloss, found) for gloss, found in glosses if found]

    def prompts(self, prompt: Iterable[str], sentences: Iterable[str]) -> list[list[int]]:
        """Returns token ids of rendered prompts."""
        from e5v_st.model.prompts_e5v import PROMPTS, render

        texts = [render(PROMPTS[p], sentence=s) for p, s in zip(prompt, sentences, strict=True)]
        return self.tokenizer(texts)["input_ids"]

    def sentence(self, row: Row, rng: np.random.Generator) -> str:
        """Returns the name, or one time in four its keywords in any order."""
        if len(row["keywords"]) > 1 and rng.random() < 0.25:
            return ", ".join(rng.permutation(row["keywords"]))
        return row["name"]

    def losses(self, step: int) -> dict[str, torch.Tensor]:
        """Returns the weighted parts of the loss."""
        import numpy as np
        import torch
        from torch.nn import functional as F

        data, model, settings = self.data, self.model, self.settings
        rng = np.random.default_rng((settings.seed, step))
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        triplets = [data.composed[i] for i in rng.choice(len(data.composed), settings.triplets, replace=False)]
        singles = [data.things[i] for i in rng.choice(len(data.things), settings.singles, replace=False)]
        chosen = list(dict.fromkeys([*(r for r, _, _ in triplets), *(t for _, _, t in triplets), *singles]))
        place = {i: k for k, i in enumerate(chosen)}
        rows = [data.rows[i] for i in chosen]

        pixels = augment(data.pixels[chosen], [mirror(row["name"]) for row in rows], generator)
        grid = 2 if rng.random() < 0.08 else 1
        if grid == 2:
            pixels = F.interpolate(pixels, scale_factor=2, mode="bicubic").clamp(0, 1)
        sees = image_tokens(model, normalised(pixels), grid)
        image_prompts = ["cirr-gallery" if rng.random() < 0.25 else "image" for _ in rows]
        prompts = self.prompts(image_prompts, [""] * len(rows))
        prompts += self.prompts(["composed"] * len(triplets), [text for _, text, _ in triplets])
        references = [place[r] for r, _, _ in triplets]
        seen = last_states(model, prompts, torch.cat([sees, sees[references]]))
        images, composed = seen[: len(rows)], seen[len(rows) :]

        glosses = [self.glosses[i] for i in rng.choice(len(self.glosses), settings.glosses, replace=False)]
        sentences = [self.sentence(row, rng) for row in rows] + [gloss for gloss, _ in glosses]
        text_prompts = ["sts" if rng.random() < 0.2 else "text" for _ in sentences]
        texts = last_states(model, self.prompts(text_prompts, sentences))

        bags = [self.bags[i] for i in chosen]
        wanted = [place[t] for _, _, t in triplets]
        diagonal = torch.arange(len(rows))
        captions = texts[: len(rows)]
        return {
            "image_words": word_loss(model, images, bags),
            "text_words": word_loss(model, captions, bags),
            "composed_words": 0.5 * word_loss(model, composed, [bags[k] for k in wanted]),
            "gloss_words": 0.3 * word_loss(model, texts[len(rows) :], [found for _, found in glosses]),
            "match": match(images, captions, diagonal) / 2 + match(captions, images, diagonal) / 2,
            "composed": 0.5 * match(composed, images, torch.tensor(wanted)),
        }


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(settings: Settings, model: LlavaNextForConditionalGeneration) -> torch.optim.AdamW:
    """Returns AdamW; only matrices decay."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))
