"""What a job will cost before anything is downloaded or loaded: tokens by family and layout, and time.

Tokens are those of whole prompts, each different item once. Images count exactly where their sizes are known, and where
the model's configuration, tokenizer and processor are on this machine; weights are never read. Otherwise the numbers of
E5-V's own checkpoint stand in, whose tokenizer and tiles are known.

Time is counted in arithmetic: matrix products of the language model for every token, of the vision tower for every
tile. :func:`measure` says how many this machine does in a second, with random numbers of the model's own sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model.prompts_e5v import IMAGE, find_format
from .provenance import CONFIG, base_of, find_folder
from .published import PUBLISHED_IDS

if TYPE_CHECKING:
    import torch
    from transformers import LlavaNextConfig

    from .model.backbone_e5v import Backbone

#: Height, width, and which part of the images has this size.
Shape = tuple[int, int, float]

#: Characters of a token of Llama 3 by language or script, counted with its tokenizer on sentences in each.
CHARACTERS = {
    **{"eng": 4.4, "Latn": 3.3, "Cyrl": 3.1, "Grek": 2.6, "Arab": 2.5, "Hebr": 0.95, "Deva": 2.0, "Beng": 0.8},
    **{"Telu": 0.55, "Thai": 2.2, "Jpan": 1.5, "Hans": 1.1, "Hant": 1.1, "Hang": 1.7, "Kore": 1.7},
}
#: For a script that is not in the table.
RARE = 1.5
#: English as in captions and questions, on which the tokenizer of a model at hand is compared with Llama 3's.
SAMPLE = (
    "Two dogs run across a green field next to a wooden fence.",
    "A man in a red shirt is riding a bicycle down a narrow street.",
    "What is the name of the building in this picture?",
    "All human beings are born free and equal in dignity and rights.",
)
#: Tokens that E5-V's chat format takes, its BOS token included.
LLAMA3_FRAME = 11
#: Seconds that measuring takes at most.
MEASURING = 60.0


@dataclass(frozen=True)
class Layers:
    """Sizes of a stack of transformer layers, for counting its arithmetic."""

    count: int
    hidden: int
    intermediate: int
    key_value: int
    gated: bool

    @property
    def products(self) -> float:
        """Multiplications and additions for one token in all layers, without those of attention's scores."""
        attention = self.hidden * (2 * self.hidden + 2 * self.key_value)
        return 2.0 * self.count * (attention + (3 if self.gated else 2) * self.hidden * self.intermediate)


#: royokong/e5-v: Llama-3-8B, and CLIP-L/14 at 336 pixels (its last layer is not run).
E5V_LANGUAGE, E5V_TOWER = Layers(32, 4096, 14336, 1024, gated=True), Layers(23, 1024, 4096, 1024, gated=False)


@dataclass(frozen=True)
class Amount:
    """What is to be computed; amounts can be added."""

    texts: float = 0
    images: float = 0
    both: float = 0
    tokens: float = 0
    patches: float = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, share: float) -> Amount:
        """Returns a part of it."""
        return Amount(*(value * share for value in vars(self).values()))

    @property
    def items(self) -> float:
        """Texts, images and pairs of both together."""
        return self.texts + self.images + self.both


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens as a model has them.

    Attributes:
        about: Whose numbers these are.
        family: The model's, as ``e5v backbones`` lists it.
        layout: The image layout; empty for families without a choice.
        language: The language model's layers.
        tower: The vision tower's; ``None`` where the configuration does not say.
        frame: Tokens of a prompt without its text and its images.
        characters: Characters of a token of English.
        image: Tokens of an image of so much height and width, and its patches in the tower.
        exact: Whether the model's own files were read.
    """

    about: str
    family: str
    layout: str
    language: Layers
    tower: Layers | None
    frame: Callable[[str], int]
    characters: float
    image: Callable[[int, int], tuple[float, float]]
    exact: bool

    def count(
        self,
        prompt: str,
        number: float,
        *,
        characters: float | None = None,
        language: str = "eng-Latn",
        shapes: Sequence[Shape] = (),
    ) -> Amount:
        """Counts items that have one prompt.

        Args:
            prompt: The template.
            number: Of items.
            characters: Of each item's text on average; ``None`` where there is no text.
            language: Of the texts, as mteb writes it.
            shapes: Of each item's image; empty where there is none.
        """
        tokens, patches = float(self.frame(prompt)), 0.0
        for height, width, share in shapes:
            own, seen = self.image(height, width)
            tokens, patches = tokens + own * share, patches + seen * share
        if characters is not None:
            tokens += characters / (characters_of(language) * self.characters / CHARACTERS["eng"])
        kind = "both" if shapes and characters is not None else "images" if shapes else "texts"
        return replace(Amount(tokens=tokens * number, patches=patches * number), **{kind: number})

    def seconds(self, amount: Amount, speed: float) -> float:
        """Returns how long an amount takes at so many multiplications and additions a second."""
        tower = self.tower.products * amount.patches if self.tower else 0.0
        return (self.language.products * amount.tokens + tower) / speed


def characters_of(language: str) -> float:
    """Returns how many characters a token of Llama 3 has in a language, such as ``"deu-Latn"``."""
    name, _, script = language.partition("-")
    return CHARACTERS.get(name, CHARACTERS.get(script, RARE))


# ---- sizes of images ----


def shapes_of(statistics: Mapping[str, Any]) -> list[Shape]:
    """Returns likely sizes of images of which only the least, the average and the largest are known.

    Exact where all images have one size. Photographs often share their longer side, upright or not; then the average
    height and width tell how many are upright, and how many are as 3 to 2 and how many as 4 to 3. Others are spread
    around the average.

    Args:
        statistics: With ``min_image_width``, ``average_image_width`` and so on, as mteb describes a dataset.
    """
    (low_h, height, high_h), (low_w, width, high_w) = (
        [float(statistics[f"{name}_image_{side}"]) for name in ("min", "average", "max")]
        for side in ("height", "width")
    )
    if (low_h, low_w) == (high_h, high_w):
        return [(int(high_h), int(high_w), 1.0)]
    longer = max(high_h, high_w)
    shorter = height + width - longer
    if min(high_h, high_w) >= 0.9 * longer and 0.4 * longer <= shorter < longer:
        upright = min(max((height - shorter) / (longer - shorter), 0.0), 1.0)
        sides = _sides_of_photographs(longer, shorter)
        flat = [(round(side), round(longer), (1 - upright) * part) for side, part in sides]
        return [*flat, *((round(longer), round(side), upright * part) for side, part in sides)]
    return [
        (max(1, round(height * part)), max(1, round(width * other)), 1 / len(SPREAD) ** 2)
        for part in SPREAD
        for other in SPREAD
    ]


def _sides_of_photographs(longer: float, mean: float) -> list[tuple[float, float]]:
    """Returns shorter sides and their parts: those of films and of old screens, as many of each as give the mean."""
    film, screen = longer * 2 / 3, longer * 3 / 4
    if film <= mean <= screen:
        part = (screen - mean) / (screen - film)
        return [(film, part), (screen, 1 - part)]
    return [(min(mean * part, longer), 1 / len(SPREAD)) for part in SPREAD]


#: How far sides lie from their average.
SPREAD = (0.85, 1.0, 1.15)


def sizes_of(images: Iterable[tuple[int, int]]) -> list[Shape]:
    """Returns the sizes of images that are known one by one, each with its part."""
    counted: dict[tuple[int, int], int] = {}
    for size in images:
        counted[size] = counted.get(size, 0) + 1
    whole = sum(counted.values())
    return [(height, width, count / whole) for (height, width), count in counted.items()]


# ---- models ----


def find_counter(
    name: str, *, image_layout: str | None = None, max_image_tokens: int | None = None, revision: str | None = None
) -> TokenCounter:
    """Returns the counter of a model: from its small files if they are on this machine, else that of E5-V.

    Args:
        name: A directory or hub id, of a model or of an adapter.
        image_layout: Of LLaVA-NeXT.
        max_image_tokens: As for ``e5v_st.load``.
        revision: Of the hub id.
    """
    folder = find_folder(name, revision)
    if folder is not None and not (folder / CONFIG).is_file():
        base, base_revision = base_of(folder)
        folder = find_folder(base, base_revision) if base else None
    if folder is not None:
        return _read_counter(folder, image_layout, max_image_tokens)
    return _e5v_counter(name, image_layout or "upstream", max_image_tokens)


def _e5v_counter(name: str, layout: str, limit: int | None) -> TokenCounter:
    from transformers import LlavaNextConfig

    known = name in PUBLISHED_IDS
    count = _llava_next_counter(LlavaNextConfig(), layout, limit if known else None)  # its tiles and grids are E5-V's

    @lru_cache(maxsize=4096)
    def image(height: int, width: int) -> tuple[float, float]:
        tokens, patches = count(height, width)
        # The limit of another family, whose images are as large as it lets them be
        part = 1.0 if known or limit is None else min(1.0, limit / tokens)
        return part * tokens, part * patches

    def frame(prompt: str) -> int:
        words = prompt.replace(IMAGE, "").replace("<sent>", "")
        return LLAMA3_FRAME + round(len(words) / CHARACTERS["eng"])

    told = name if known else f"{name} is not on this machine: the numbers of royokong/e5-v stand in"
    return TokenCounter(
        told, "llava_next-llama3", layout, E5V_LANGUAGE, E5V_TOWER, frame, CHARACTERS["eng"], image, exact=False
    )


def _llava_next_counter(
    config: LlavaNextConfig, layout: str, limit: int | None
) -> Callable[[int, int], tuple[float, float]]:
    """Returns what counts an image's tokens and patches, from its height and width."""
    from .model.llava_next_e5v import count_tiles, count_tokens
    from .model.processor_e5v import grids_within

    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    if limit is not None:
        config.image_grid_pinpoints = grids_within(config.image_grid_pinpoints, tile, patch, limit)
    patches = (tile // patch) ** 2 + 1

    def image(height: int, width: int) -> tuple[float, float]:
        return count_tokens(height, width, config, layout), patches * count_tiles(height, width, config)

    return image


def _read_counter(folder: Path, layout: str | None, limit: int | None) -> TokenCounter:
    from transformers import AutoConfig, AutoTokenizer

    from .model.backbone_e5v import find_backbone
    from .model.processor_e5v import count_tokens as planned
    from .model.processor_e5v import limit_image_tokens, load_processor, read_template
    from .saved import read_transformer_settings

    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backbone = find_backbone(config, tokenizer, read_template(str(folder), tokenizer))
    saved = read_transformer_settings(folder, ["image_layout", "max_image_tokens"])
    layout = layout or saved.get("image_layout") or "upstream"
    known = (limit, saved.get("max_image_tokens"), backbone.image_tokens)
    limit = next((each for each in known if each is not None), None)
    tower = _tower(config)
    if backbone.is_llava_next:
        image = _llava_next_counter(config, layout, limit)
    else:
        processor = load_processor(str(folder), backbone, tokenizer)
        if limit is not None:
            limit_image_tokens(processor, backbone, limit)
        merged = _merged(config, processor)

        around = _tokens_around(processor, backbone, tokenizer)

        def image(height: int, width: int) -> tuple[float, float]:
            tokens = planned(processor, [(height, width)])[0]
            return tokens + around, tokens * merged

    def frame(prompt: str) -> int:
        text = find_format(backbone.wrapper).replace("{}", prompt).replace("<sent>", "").replace(IMAGE, "")
        return len(tokenizer(text, add_special_tokens=backbone.adds_bos).input_ids)

    language = _layers(config.get_text_config())
    if language is None:
        raise ValueError(f"{folder / CONFIG} does not say how large the language model is: give --rate")
    tokens = sum(len(tokenizer(" " + text, add_special_tokens=False).input_ids) for text in SAMPLE)
    return TokenCounter(
        folder.name,
        backbone.name,
        layout if backbone.is_llava_next else "",
        language,
        tower,
        lru_cache(frame),
        sum(map(len, SAMPLE)) / tokens,
        lru_cache(maxsize=4096)(image),
        exact=True,
    )


def _tokens_around(processor: Any, backbone: Backbone, tokenizer: Any) -> int:
    """Returns how many tokens an image takes that its processor does not count, such as those of its begin and end."""
    from PIL import Image

    from .model.pixels_e5v import ImageReader
    from .model.processor_e5v import count_tokens

    (shown,) = ImageReader(processor, backbone, processor.image_token).read([Image.new("RGB", (64, 64))]).shown
    others = len(tokenizer(shown.text, add_special_tokens=False).input_ids) - len(shown.runs)
    return others + sum(shown.runs) - count_tokens(processor, [(64, 64)])[0]


def _layers(config: Any) -> Layers | None:
    """Reads sizes from a part of a configuration, under the names that families give them; ``None`` if some lack."""
    known = config.to_dict() if config is not None else {}

    def first(*names: str) -> int | None:
        return next((known[name] for name in names if isinstance(known.get(name), int)), None)

    count, hidden = first("num_hidden_layers", "depth"), first("hidden_size", "embed_dim")
    intermediate = first("intermediate_size") or (hidden or 0) * int(known.get("mlp_ratio") or 4)
    heads = first("num_attention_heads", "num_heads")
    if not count or not hidden or not heads:
        return None
    groups = first("num_key_value_heads") or heads
    key_value = groups * (first("head_dim") or hidden // heads)
    return Layers(count, hidden, intermediate, key_value, gated="num_key_value_heads" in known)


def _tower(config: Any) -> Layers | None:
    """Reads the sizes of the vision tower, without layers that are not run."""
    from .model.skipping_e5v import count_layers_read

    tower = _layers(getattr(config, "vision_config", None))
    return tower and replace(tower, count=int(min(tower.count, count_layers_read(config))))


def _merged(config: Any, processor: Any) -> float:
    """Returns how many patches of the tower become one token."""
    images = processor.image_processor
    side = getattr(images, "merge_size", None) or getattr(config, "scale_factor", None)
    if side is None:
        factor = getattr(config, "downsample_ratio", None)
        side = 1 / factor if factor else 1
    return float(side) ** 2


# ---- time ----


def measure(
    layers: Layers, device: str | None = None, dtype: str | None = None, seconds: float = MEASURING, rows: int = 512
) -> float:
    """Measures how many multiplications and additions a second this machine does in one layer of a model.

    Random numbers take the place of weights. Caches, kernels and the device's own limits are as in a run; reading
    images and what lies between layers are not in it, so that a run of a small model is slower.

    Args:
        layers: The language model's.
        device: Of torch; a GPU if there is one.
        dtype: Of the weights; bfloat16 on a GPU, else float32.
        seconds: At most.
        rows: Tokens that go through the layer together.
    """
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    shapes = [
        (layers.hidden, layers.hidden + 2 * layers.key_value),
        (layers.hidden, layers.hidden),
        (layers.hidden, (2 if layers.gated else 1) * layers.intermediate),
        (layers.intermediate, layers.hidden),
    ]
    weights = [torch.rand(outs, ins, device=where).sub_(0.5).to(kind) for ins, outs in shapes]
    inputs = {ins: torch.rand(rows, ins, device=where).to(kind) for ins, _ in shapes}
    work = 2.0 * rows * sum(ins * outs for ins, outs in shapes)
    done, start = 0, time.perf_counter()
    with torch.inference_mode():
        _pass(inputs, weights, where)  # kernels are chosen, memory is taken
        warm = time.perf_counter()
        while done < 3 or (done < 30 and time.perf_counter() - start < seconds / 6):
            _pass(inputs, weights, where)
            done += 1
            if time.perf_counter() - start > seconds:
                break
    return work * done / (time.perf_counter() - warm)


def _pass(inputs: Mapping[int, torch.Tensor], weights: Sequence[torch.Tensor], device: torch.device) -> None:
    import torch

    for weight in weights:
        torch.nn.functional.linear(inputs[weight.shape[1]], weight)
    if device.type == "cuda":
        torch.cuda.synchronize()


def tell_time(seconds: float) -> str:
    """Returns a time for people.

    Example:
        >>> tell_time(40), tell_time(600), tell_time(40000), tell_time(400000)
        ('40 s', '10 min', '11.1 h', '4.6 days')
    """
    for unit, size, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= (2 if unit == "days" else 1.5) * size:
            return f"{seconds / size:,.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def tell_number(value: float) -> str:
    """Returns a number for people: whole, with separators, and short where it is large.

    Example:
        >>> tell_number(1234.4), tell_number(12_345_678), tell_number(5.4e9)
        ('1,234', '12.3 M', '5.4 G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:,.0f}"
