"""The untrained model, and its forward as training needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .tokenizer import ROWS

if TYPE_CHECKING:
    import torch
    from transformers import LlavaNextForConditionalGeneration

TILE, PATCH = 60, 20
#: The published checkpoint's grids scaled from its tile of 336 pixels, and a single tile for small images.
PINPOINTS = [[60, 60], [60, 120], [120, 60], [120, 120], [180, 60], [60, 180]]
#: CLIP's normalisation, as in the published preprocessor_config.json.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def build_model(seed: int) -> LlavaNextForConditionalGeneration:
    """Returns the untrained model, 5 million parameters; tied embeddings, which are written out untied."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    torch.manual_seed(seed)
    spread = 0.07  # with the usual 0.02 the contrastive loss stays at chance for hundreds of steps
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=192,
        initializer_range=spread,
    )
    text = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        vocab_size=ROWS,
        bos_token_id=0,
        eos_token_id=4,
        initializer_range=spread,
        tie_word_embeddings=True,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ROWS,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaNextForConditionalGeneration(config)


def image_tokens(model: LlavaNextForConditionalGeneration, pixels: torch.Tensor, grid: int = 1) -> torch.Tensor:
    """Returns what the language model sees of square images: the whole image, then the grid with newlines.

    The same as transformers' own path, but an image of one tile goes through the tower once and not twice.

    Args:
        model: The model.
        pixels: Normalised, float (n, 3, 60 * grid, 60 * grid).
        grid: 1 or 2 tiles a side.

    Returns:
        (n, 9 + 9 * grid ** 2 + 3 * grid, 192).
    """
    import torch
    from torch.nn import functional as F

    side = TILE // PATCH

    def features(tiles: torch.Tensor) -> torch.Tensor:
        hidden = model.model.vision_tower(tiles).last_hidden_state[:, 1:]
        return model.model.multi_modal_projector(hidden)

    n = len(pixels)
    if grid == 1:
        base = features(pixels)
        patches = base.unflatten(1, (side, side))
    else:
        tiles = pixels.unflatten(2, (grid, TILE)).unflatten(4, (grid, TILE)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        whole = F.interpolate(pixels, size=(TILE, TILE), mode="bicubic", antialias=True)
        base, patches = features(torch.cat([whole, tiles])).split([n, n * grid**2])
        patches = patches.unflatten(0, (n, grid, grid)).unflatten(3, (side, side))
        patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    newline = model.model.image_newline.to(patches.dtype).expand(n, patches.shape[1], 1, -1)
    return torch.cat([base, torch.cat([patches, newline], dim=2).flatten(1, 2)], dim=1)


def last_states(
    model: LlavaNextForConditionalGeneration, prompts: list[list[int]], images: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the hidden state at the last token of each prompt, (n, 192), after the final norm.

    Args:
        model: The model.
        prompts: Token ids, one image token each where there are images.
        images: (n, tokens, 192), one for each prompt.
    """
    import torch

    if images is not None:
        at = [ids.index(ROWS) for ids in prompts]
        prompts = [ids[:i] + [ROWS] * images.shape[1] + ids[i + 1 :] for ids, i in zip(prompts, at, strict=True)]
    # Padded on the right: causal attention then needs no mask, and no real token sees a pad.
    longest = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
    is_image = ids == ROWS
    embedded = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
    if images is not None:
        embedded = embedded.masked_scatter(is_image.unsqueeze(-1), images.to(embedded.dtype))
    states = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return states[torch.arange(len(prompts)), torch.tensor([len(p) - 1 for p in prompts])]


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Returns images of 0 to 1, (n, 3, h, w), in CLIP's normalisation."""
    import torch

    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(pixels: torch.Tensor, flip: Sequence[bool], generator: torch.Generator) -> torch.Tensor:
    """Shifts, scales, turns and mirrors images a little, and changes their brightness by 4 % at most.

    Args:
        pixels: uint8 (n, 3, 60, 60) on white.
        flip: Which ones may be mirrored.
        generator: The source of chance.

    Returns:
        float (n, 3, 60, 60), 0 to 1.
    """
    import torch
    from torch.nn import functional as F

    n = len(pixels)
    draw = torch.rand(n, 6, generator=generator) * 2 - 1
    angle, scale = draw[:, 0] * 0.14, 1.0 + draw[:, 1] * 0.12
    sign = torch.where((draw[:, 2] > 0) & torch.tensor(list(flip)), -1.0, 1.0)
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([cosine * sign, -sine, draw[:, 3] * 0.12, sine * sign, cosine, draw[:, 4] * 0.12], 1)
    where = F.affine_grid(matrix.view(n, 2, 3), [n, 3, TILE, TILE], align_corners=False)
    moved = 1.0 - F.grid_sample(1.0 - pixels.float() / 255, where, align_corners=False)
    return (moved * (1.0 + draw[:, 5].view(n, 1, 1, 1) * 0.04)).clamp(0, 1)
