"""Step one of the embedded default: a small LLaVA-NeXT learns, from scratch, to say what it sees and reads in one word.

    python training/pretrain_tiny.py --output_dir runs/tiny-step-one

It stands for what LLaVA-NeXT brings to E5-V, on the data of ``mteb_tasks/data`` and on its ``train`` split alone.
Prompts are E5-V's own. What is learnt, all of it at the last token of the prompt, where E5-V reads its embedding:

- *words*: through the LM head, the words of the name (0.7) and of the keywords (0.3), as a bag, for a picture, for a
  sentence (name or shuffled keywords), for a picture with a change in words (the words of the changed picture), and a
  noun for its gloss;
- *pictures and sentences*: each picture in the batch finds its own sentence and each sentence its picture (temperature
  0.05), half of the pictures being pairs that differ only in skin tone or gender; and picture + change finds the
  changed picture.

Every batch depends on the seed and the number of the step alone, so a run that was stopped and goes on with
``--resume``, from its last saved state, sees the same batches. The result is written in the format of the published
checkpoint: old key names, half precision, an image token one beyond the embedding, a processor without ``patch_size``.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedTokenizerFast

DATA = Path(__file__).parents[1] / "mteb_tasks" / "data"
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TILE, PATCH = 60, 20
#: The published checkpoint's grids scaled from its tile of 336 pixels, and a single tile for small pictures.
PINPOINTS = [[60, 60], [60, 120], [120, 60], [120, 120], [180, 60], [60, 180]]
#: CLIP's normalisation, as in the published preprocessor_config.json.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROWS = 4000
TEMPERATURE = 0.05
#: Words that say nothing of what is seen; every skin tone's name has "skin tone" in it.
_STOP_WORDS = "a an and at for from in into is it of on or s skin that the to tone used which with"
STOP_WORDS = frozenset(_STOP_WORDS.split())
#: A picture whose name has one of these must not be mirrored.
HANDED = re.compile(
    r"left|right|clock|thirty|arrow|flag|keycap|button|down|up|sign|circled|east|west|input|square|ideograph"
)

Item = tuple[str, int | None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What one run depends on."""

    output_dir: Path = Path("runs/tiny-step-one")
    steps: int = 2600
    seed: int = 0
    resume: bool = False
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    triplets: int = 20
    singles: int = 40
    glosses: int = 40
    save_every: int = 200
    threads: int = 2


# --- data ---


@dataclass(frozen=True)
class Data:
    """The training part: pictures as uint8 (n, 3, 60, 60), rows, and triplets (reference, text, target) of indices."""

    pixels: torch.Tensor
    rows: list[Row]
    composed: list[tuple[int, str, int]]
    glosses: list[tuple[str, str]]
    things: list[int]


def read(name: str) -> list[Row]:
    """Returns the rows of one of the data's Parquet files."""
    import pyarrow.parquet as pq

    return pq.read_table(DATA / name).to_pylist()


def load_data() -> Data:
    """Returns the training split; nothing held out is in it."""
    import numpy as np
    import torch
    from PIL import Image

    rows = [row for row in read("emoji.parquet") if row["split"] == "train"]
    pictures = [np.asarray(Image.open(io.BytesIO(row.pop("image"))).convert("RGB")) for row in rows]
    where = {row["id"]: i for i, row in enumerate(rows)}
    composed = [r for r in read("composed.parquet") if r["split"] == "train"]
    glosses = [r for r in read("text_pairs.parquet") if r["split"] == "train" and r["kind"] == "gloss"]
    return Data(
        pixels=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
        rows=rows,
        composed=[(where[r["reference"]], r["text"], where[r["target"]]) for r in composed],
        glosses=[(r["query"], r["target"]) for r in glosses],
        things=[i for i, row in enumerate(rows) if not row["tone"]],
    )


def train_tokenizer(data: Data) -> PreTrainedTokenizerFast:
    """Returns a lower-case byte-level BPE of ``ROWS`` tokens with Llama-3's control tokens, then ``<image>``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from e5v_st.prompts_e5v import PROMPTS, render

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for row in data.rows for text in (row["name"], *row["keywords"])]
    texts += [change for _, change, _ in data.composed] + [text for pair in data.glosses for text in pair]
    # The first word of a sentence has no space before it.
    texts += [f" {text}" for text in texts]
    prompts = [render(prompt).replace("<image>", " ") for prompt in PROMPTS.values()]
    prompts = [re.sub(r"<\|.*?\|>", "", prompt) for prompt in prompts] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + prompts, trainer)
    if tokenizer.get_vocab_size() != ROWS:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, {ROWS} are wanted: lower ROWS")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A $B:1",
        special_tokens=[("<|begin_of_text|>", 0)],
    )
    tokenizer.add_tokens([AddedToken("<image>", special=False, normalized=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIALS[0],
        eos_token=SPECIALS[-1],
        pad_token=SPECIALS[-1],
        padding_side="left",
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
    )


def content_words(text: str) -> list[str]:
    """Returns the lower-case words of a text that say something."""
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in STOP_WORDS]


def bag(tokenizer: PreTrainedTokenizerFast, parts: Sequence[tuple[float, Iterable[str]]]) -> dict[int, float]:
    """Returns token id -> probability: each part's weight spread over its words, each word's over its tokens."""
    found: dict[int, float] = {}
    for weight, texts in parts:
        words = [word for text in texts for word in content_words(text)]
        for word in words:
            ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            for token in ids:
                found[token] = found.get(token, 0.0) + weight / len(words) / len(ids)
    total = sum(found.values())
    return {token: share / total for token, share in found.items()}


def mirror(name: str) -> bool:
    """Whether a picture means the same when mirrored."""
    return HANDED.search(name.lower()) is None


# --- model ---


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
    """Returns what the language model sees of square pictures: the whole picture, then the grid with newlines.

    The same as transformers' own path, but a picture of one tile goes through the tower once and not twice.

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
    """Returns the state at the last token of each prompt, (n, 192), after the final norm.

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
    """Returns pictures of 0 to 1, (n, 3, h, w), in CLIP's normalisation."""
    import torch

    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(pixels: torch.Tensor, flip: Sequence[bool], generator: torch.Generator) -> torch.Tensor:
    """Shifts, scales, turns and mirrors pictures a little, and changes their brightness by 4 % at most.

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


# --- one step ---


def match(queries: torch.Tensor, keys: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each query's cosines with all keys at ``TEMPERATURE``; ``targets`` index the right keys."""
    from torch.nn import functional as F

    cosines = F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T
    return F.cross_entropy(cosines / TEMPERATURE, targets)


def word_loss(
    model: LlavaNextForConditionalGeneration, states: torch.Tensor, bags: list[dict[int, float]]
) -> torch.Tensor:
    """Cross entropy of the LM head's distribution at each state with its bag of words."""
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
        from e5v_st.prompts_e5v import PROMPTS, render

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


# --- checkpoints ---


def save_state(path: Path, settings: Settings, model: Any, optimizer: torch.optim.AdamW, step: int) -> None:
    """Writes weights, optimizer moments and the number of steps done as one safetensors file."""
    import torch
    from safetensors.torch import save_file

    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": torch.as_tensor(v) for key, v in optimizer.state.get(parameter, {}).items()}
    notes = {"step": str(step), "settings": json.dumps(asdict(settings), default=str)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".tmp"), notes)
    os.replace(path.with_suffix(".tmp"), path)


def load_state(path: Path, model: Any, optimizer: torch.optim.AdamW) -> int:
    """Puts back what :func:`save_state` wrote and returns the number of steps done."""
    import torch
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"nothing to resume in {path.parent}: {path.name} is not there; leave out --resume")
    with safe_open(path, "pt") as file, torch.no_grad():
        held = set(file.keys())
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            # The tower's last norm stands after the layer that is used: it has no gradient and so no moments.
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in held]
            if keys:
                optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        return int(file.metadata()["step"])


_OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.", ""),
    ("lm_head.", "language_model.lm_head."),
)


def old_name(name: str) -> str:
    """Returns a parameter's name as transformers 4.41 wrote it."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    for new, old in _OLD_NAMES:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise ValueError(f"{name!r} is no parameter of LLaVA-NeXT as transformers 5 names them")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def export(model: LlavaNextForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in half precision in the format of royokong/e5-v."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {old_name(n): p.detach().to(torch.float16).contiguous() for n, p in model.named_parameters()}
    embedding = tensors["language_model.model.embed_tokens.weight"]
    tensors.setdefault("language_model.lm_head.weight", embedding.clone())
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"weights that are not finite in half precision: {bad[:3]}; nothing written to {folder}")
    save_file(tensors, folder / "model.tmp", {"format": "pt"})
    os.replace(folder / "model.tmp", folder / "model.safetensors")
    for name, content in published_configs(model).items():
        write_json(folder / name, content)
    shutil.rmtree(folder / "tokenizer.tmp", ignore_errors=True)
    tokenizer.save_pretrained(folder / "tokenizer.tmp")
    os.replace(folder / "tokenizer.tmp" / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "tokenizer.tmp")


def published_configs(model: LlavaNextForConditionalGeneration) -> dict[str, Any]:
    """Returns the small JSON files of the published format, those of transformers 4.41.2."""
    text, vision = model.config.text_config, model.config.vision_config
    keep_text = ("hidden_size", "intermediate_size", "max_position_embeddings", "model_type", "num_attention_heads")
    keep_text += (
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "vocab_size",
    )
    keep_vision = ("hidden_size", "image_size", "intermediate_size", "model_type", "num_attention_heads")
    keep_vision += ("num_hidden_layers", "patch_size", "projection_dim")
    version = {"transformers_version": "4.41.2"}
    named = dict(zip(("bos_token", "eos_token", "pad_token"), (SPECIALS[0], SPECIALS[-1], SPECIALS[-1]), strict=True))
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    added = {
        str(i): {"content": content, **flags, "normalized": i == ROWS, "special": i < ROWS}
        for i, content in [*enumerate(SPECIALS), (ROWS, "<image>")]
    }
    return {
        "config.json": {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "ignore_index": -100,
            "image_grid_pinpoints": PINPOINTS,
            "image_token_index": ROWS,
            "model_type": "llava_next",
            "projector_hidden_act": "gelu",
            "text_config": {name: getattr(text, name) for name in keep_text} | {"rope_theta": 500000.0},
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vision_config": {name: getattr(vision, name) for name in keep_vision},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            **version,
        },
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 4, **version},
        "preprocessor_config.json": {
            "crop_size": {"height": TILE, "width": TILE},
            **{f"do_{what}": True for what in ("center_crop", "convert_rgb", "normalize", "pad", "rescale", "resize")},
            "image_grid_pinpoints": PINPOINTS,
            "image_mean": MEAN,
            "image_processor_type": "LlavaNextImageProcessor",
            "image_std": STD,
            "processor_class": "LlavaNextProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": TILE},
        },
        "special_tokens_map.json": named,
        "tokenizer_config.json": {
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 8192,
            "padding_side": "left",
            "processor_class": "LlavaNextProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
        },
    }


# --- evaluation, in plain transformers ---


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
    """Embeds (picture or None, sentence) pairs with one of E5-V's prompts: (n, 192), float32, L2-normalised."""
    import torch
    from torch.nn import functional as F

    from e5v_st.prompts_e5v import PROMPTS, render

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


def pictures(rows: list[Row]) -> list[Any]:
    """Returns the rows' pictures as PIL images."""
    from PIL import Image

    return [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]


def evaluate(model: Any, processor: Any, splits: Sequence[str]) -> dict[str, Any]:
    """Scores retrieval of pictures by name and back, composed retrieval and text pairs, with the chance levels."""
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

    ``reference only`` is the same with the reference's picture as the query, which never reads the words.
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


# --- the run ---


def validation_recall(trainer: Trainer) -> float:
    """Returns text -> image R@1 on the validation split in percent, for the log."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    rows = [row for row in read("emoji.parquet") if row["split"] == "validation" and row["gallery"]]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures(rows)])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        sees = image_tokens(trainer.model, normalised(pixels))
        images = last_states(trainer.model, trainer.prompts(["image"] * len(rows), [""] * len(rows)), sees)
        texts = last_states(trainer.model, trainer.prompts(["text"] * len(rows), [row["name"] for row in rows]))
    return recalls(F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T, range(len(rows)))["R@1"]


def train(settings: Settings) -> Trainer:
    """Trains, saving the state every ``save_every`` steps and on Ctrl-C."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(settings.threads)
    data = load_data()
    trainer = Trainer(settings, data, train_tokenizer(data))
    optimizer = make_optimizer(settings, trainer.model)
    state = settings.output_dir / "state.safetensors"
    start = load_state(state, trainer.model, optimizer) if settings.resume else 0
    log, begun = settings.output_dir / "log.jsonl", time.monotonic()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    step = start
    try:
        for step in (bar := tqdm(range(start, settings.steps), initial=start, total=settings.steps, unit="step")):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            with torch.autocast("cpu", torch.bfloat16):
                losses = trainer.losses(step)
            total = sum(losses.values())
            if not total.isfinite():
                raise FloatingPointError(f"the loss is {total.item()} at step {step}: lower --lr")
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{total.item():.3f}")
            saves = (step + 1) % settings.save_every == 0
            if saves:
                save_state(state, settings, trainer.model, optimizer, step + 1)
            if saves or (step + 1) % 20 == 0:
                line: Row = {"step": step + 1, **{k: round(v.item(), 3) for k, v in losses.items()}}
                line["seconds"] = round(time.monotonic() - begun, 1)
                if saves:
                    line["validation R@1"] = validation_recall(trainer)
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    except KeyboardInterrupt:
        # The step that was cut short may have changed some weights: the state of the last full save stands.
        sys.exit(f"stopped at step {step}; go on with --resume --output_dir {settings.output_dir}")
    return trainer


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Reads the command line: one option for each field of :class:`Settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        if field.name == "resume":
            parser.add_argument("--resume", action="store_true", help="go on from the state in output_dir")
        else:
            kind = type(field.default) if field.name != "output_dir" else Path
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"default: {field.default}")
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Trains, exports, opens the export in plain transformers and scores it, trained and untrained."""
    settings = parse()
    begun = time.monotonic()
    trainer = train(settings)
    minutes = round((time.monotonic() - begun) / 60, 1)
    model_dir = settings.output_dir / "model"
    export(trainer.model, trainer.tokenizer, model_dir)
    export(build_model(settings.seed), trainer.tokenizer, settings.output_dir / "untrained")
    splits = ("validation", "combination", "concept")
    report = {
        "command": "python " + " ".join(sys.argv),
        **asdict(settings),
        "minutes": minutes,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained": evaluate(*open_plain(model_dir), splits),
        "untrained": evaluate(*open_plain(settings.output_dir / "untrained"), splits),
    }
    write_json(settings.output_dir / "step_one.json", json.loads(json.dumps(report, default=str)))
    print(json.dumps(report["trained"], indent=2))


if __name__ == "__main__":
    main()
