"""Makes the golden numbers again with plain transformers and peft; see README.md beside this file.

    python make_goldens.py FOLDER            # makes what the installed transformers can make
    python make_goldens.py FOLDER --compare  # compares what is in FOLDER with the files beside this script

transformers 4.41.2 makes the "paper" files, ``training.npz`` and ``metrics.json``; transformers 5 the "upstream" files.
Nothing here imports this project: the recipe is the published code's, written down once more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

HERE = Path(__file__).parent
PIN = "4.41.2"
TOLERANCE = 2e-5

CHAT = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
TEXT = CHAT.format("<sent>\nSummary above sentence in one word: ")
IMAGE = CHAT.format("<image>\nSummary above image in one word: ")
CIRR_GALLERY = CHAT.format("<image>\n Describe this image in one word:")
CIRR_QUERY = CHAT.format('<image>Modify this image with "<sent>", desribe modified image in one word:')
FASHIONIQ_GALLERY = CHAT.format("<image>\n Describe this {} in one word based on its style:")
FASHIONIQ_QUERY = CHAT.format(
    "<image> change the style of this {} to <sent>\n Desribe this modified {} in one word based on its style:"
)
STS = "<sent>\nSummary above sentence in one word:"

TEXTS = [
    "A dog sitting in the grass.",
    "A cat standing in the snow.",
    "",
    "Hi",
    'A much longer sentence, with "quotes", numbers 12345 and punctuation; it keeps going so that padding matters in a '
    "batch!",
    "naïve café — ünïcode 你好 🙂",
    "Is this a question?",
    "no final full stop",
    "trailing space ",
]
CHANGES = ["is red, has stripes", "make it snow", "has longer sleeves and is more colourful"]
CAPTION_PAIRS = [["is red.", "has stripes, "], ["is longer", "is darker?"]]
MERGED_TEXTS = [*TEXTS[:3], "Two men are playing chess in a park while it rains."]
TRIPLETS = [
    ["A man is playing a guitar.", "Someone plays an instrument.", "Nobody is making music."],
    ["Two dogs run through the field.", "Animals are outdoors.", "The dogs are asleep on a sofa."],
    ["A woman slices an onion.", "A person prepares food.", "A woman is driving a car to work this morning."],
    ["Children are swimming in the lake.", "Kids are in water.", "The lake is empty."],
]
SEED = (
    "torch.Generator().manual_seed(3): image randn(40,16), text randn(200,16); "
    "text = normalize(image.repeat_interleave(5,0) + 0.8*noise)"
)
#: Only ``metrics.json`` has it: drawn with Arial, from a text that was not kept.
NOT_MADE = "card"


# ---- embeddings ----


def load(name: str) -> tuple[Any, Any]:
    """Returns the model and the processor of a checkpoint, repaired where transformers 5 could not run it."""
    model = LlavaNextForConditionalGeneration.from_pretrained(HERE / name, torch_dtype=torch.float32).eval()
    if transformers.__version__ == PIN:
        return model, LlavaNextProcessor.from_pretrained(HERE / name)
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return model, LlavaNextProcessor.from_pretrained(HERE / name, backend="pil", **settings)


def make_encoder(model: Any, processor: Any) -> Callable[..., torch.Tensor]:
    """Returns what gives the hidden states ``(tokens, width)`` of one prompt, after the last norm."""

    @torch.no_grad()
    def encode(prompt: str, image: Image.Image | None = None) -> torch.Tensor:
        inputs = processor(text=[prompt], images=None if image is None else [image], return_tensors="pt")
        inputs = {key: value for key, value in inputs.items() if value is not None}
        return model(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1][0]

    return encode


def unit(states: Iterable[torch.Tensor]) -> np.ndarray:
    """Returns raw states as L2-normalised rows."""
    return F.normalize(torch.stack(list(states)), dim=-1).numpy()


def sts_prompt(text: str) -> str:
    """The prompt of the published eval_sts.py, with its edits of the text."""
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    if text.endswith("?"):
        text = text[:-1] + "."
    return CHAT.format(" " + STS.replace("<sent>", text).strip())


def embeddings(name: str) -> dict[str, Any]:
    """Makes every array of ``<name>.paper.npz`` or ``<name>.upstream.npz``: one input at a time, in float32."""
    encode = make_encoder(*load(name))
    files = sorted((HERE / "images" / name).glob("*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    found: dict[str, Any] = {
        "transformers": transformers.__version__,
        "texts": TEXTS,
        "files": [file.name for file in files],
        "changes": CHANGES,
        "text": unit(encode(TEXT.replace("<sent>", text))[-1] for text in TEXTS),
        "image": unit(encode(IMAGE, image)[-1] for image in images),
        "cirr_gallery": unit(encode(CIRR_GALLERY, image)[-1] for image in images),
        "cirr_query": unit(
            encode(CIRR_QUERY.replace("<sent>", change), image)[-1] for image in images for change in CHANGES
        ),
    }
    for word in ("dress", "shirt"):
        gallery, query = FASHIONIQ_GALLERY.format(word), FASHIONIQ_QUERY.format(word, word)
        found[f"fashioniq_{word}_gallery"] = unit(encode(gallery, image)[-1] for image in images)
        sums = []
        for image, pair in zip(images, CAPTION_PAIRS, strict=False):
            captions = [caption.strip(".?, ") for caption in pair]
            orders = [", ".join(captions), ", ".join(captions[::-1])]
            sums.append(sum(encode(query.replace("<sent>", order), image)[-1] for order in orders))
        found[f"fashioniq_{word}_query"] = unit(sums)
    found["sts"] = unit(encode(sts_prompt(text))[-1] for text in TEXTS)
    found["image_tokens"] = [len(encode("<image>", image)) for image in images]
    return found


def merged() -> dict[str, Any]:
    """Merges ``legacy_adapter`` into ``small`` as the published retrieval.py does, and embeds with it (pin only)."""
    from peft import PeftModel

    model, processor = load("small")
    model.language_model = PeftModel.from_pretrained(model.language_model, HERE / "legacy_adapter").merge_and_unload()
    encode = make_encoder(model, processor)
    files = sorted((HERE / "images" / "small").glob("*.png"))[:3]
    return {
        "texts": MERGED_TEXTS,
        "files": [file.name for file in files],
        "merged_text": unit(encode(TEXT.replace("<sent>", text))[-1] for text in MERGED_TEXTS),
        "merged_image": unit(encode(IMAGE, Image.open(file).convert("RGB"))[-1] for file in files),
    }


# ---- training ----


def released_prompt(tokenizer: Any, sentence: str) -> str:
    """What the published ft_llm.py feeds: underscores go after the chat format is there, and the end is stripped."""
    sentence = tokenizer.decode(tokenizer(sentence, truncation=True, max_length=32, add_special_tokens=False).input_ids)
    template = CHAT.format("*sent_0*\nSummary_above_sentence_in_one_word:")
    return template.replace("_", " ").replace("*sent 0*", sentence).strip()


def make_batch(tokenizer: Any, prompts: list[list[str]], fix_mask: bool) -> dict[str, torch.Tensor]:
    """Stacks anchors, positives and negatives, padded on the left to one width, with one of ft_llm.py's two masks."""
    pad = tokenizer.pad_token_id
    columns = []
    for position, column in enumerate(zip(*prompts, strict=True)):
        rows = [tokenizer(prompt).input_ids for prompt in column]
        width = -(-max(map(len, rows)) // 8) * 8
        # The positives travel as labels: their padding is -100, which becomes 0, or the pad token where masks are fixed
        fill = pad if fix_mask or position != 1 else 0
        columns.append(torch.tensor([[fill] * (width - len(row)) + row for row in rows]))
    width = max(ids.shape[1] for ids in columns)
    ids = torch.cat([F.pad(ids, (width - ids.shape[1], 0), value=pad) for ids in columns])
    return {"input_ids": ids, "attention_mask": (ids != pad if fix_mask else ids > 0).long()}


def contrastive_loss(states: torch.Tensor) -> torch.Tensor:
    """Each anchor against all positives, then all hard negatives; temperature 0.05."""
    anchors, *others = states.chunk(3)
    scores = [F.cosine_similarity(anchors[:, None], other[None], dim=-1) / 0.05 for other in others]
    return F.cross_entropy(torch.cat(scores, dim=1), torch.arange(len(anchors)))


def training() -> dict[str, Any]:
    """Makes the loss and the gradient's norm over the language model's layers, for every kind of prompt and mask."""
    model, processor = load("small")
    language, tokenizer = model.get_decoder(), processor.tokenizer
    prompts = {
        1: [[released_prompt(tokenizer, sentence) for sentence in row] for row in TRIPLETS],
        0: [[TEXT.replace("<sent>", sentence) for sentence in row] for row in TRIPLETS],
    }
    found: dict[str, Any] = {"triplets": TRIPLETS, "released_prompts": prompts[1]}

    def measure(name: str, states: torch.Tensor) -> None:
        model.zero_grad()
        loss = contrastive_loss(states)
        loss.backward()
        norms = [weight.grad.norm() for weight in language.layers.parameters()]
        found[f"loss_{name}"] = loss.item()
        found[f"gradnorm_{name}"] = torch.stack(norms).norm().item()

    for released in (1, 0):
        for fix_mask in (0, 1):
            batch = make_batch(tokenizer, prompts[released], bool(fix_mask))
            measure(f"released{released}_fixmask{fix_mask}", language(**batch).last_hidden_state[:, -1])
    by_column = [prompt for column in zip(*prompts[0], strict=True) for prompt in column]
    alone = [language(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0, -1] for prompt in by_column]
    measure("clean", torch.stack(alone))
    return found


# ---- metrics ----


def recalls(scores: torch.Tensor, relevant: torch.Tensor) -> dict[int, float]:
    """Returns the share of rows that have something relevant among their best k, as the published retrieval.py does."""
    return {k: relevant.gather(1, scores.topk(k, dim=1).indices).any(dim=1).float().mean().item() for k in (1, 5, 10)}


def metrics() -> dict[str, Any]:
    """Makes ``metrics.json`` but for its ``card``: recalls of the published retrieval.py on random embeddings."""
    generator = torch.Generator().manual_seed(3)
    images = F.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    noise = torch.randn(200, 16, generator=generator)
    texts = F.normalize(images.repeat_interleave(5, 0) + 0.8 * noise, dim=-1)
    relevant = torch.arange(200)[:, None] // 5 == torch.arange(40)[None]
    by_side = {"image": recalls(texts @ images.T, relevant), "text": recalls(images @ texts.T, relevant.T)}
    found = {f"{side}_retrieval_recall@{k}": by_side[side][k] for k in (1, 5, 10) for side in by_side}
    return {"seed": SEED, "image_embeddings": images.tolist(), "text_embeddings": texts.tolist(), "metrics": found}


# ---- files ----


def make(folder: Path) -> None:
    """Writes the files that the installed transformers makes; never over a file that exists."""
    if transformers.__version__ == PIN:
        made = {f"{name}.paper.npz": lambda name=name: embeddings(name) for name in ("small", "realgrid")}
        made |= {"training.npz": lambda: merged() | training(), "metrics.json": metrics}
    elif int(transformers.__version__.split(".")[0]) >= 5:
        made = {f"{name}.upstream.npz": lambda name=name: embeddings(name) for name in ("small", "realgrid")}
    else:
        raise SystemExit(f"transformers {transformers.__version__} is installed, wanted {PIN} or 5: see README.md")
    for name in made:
        if (folder / name).exists():
            raise SystemExit(f"{folder / name} exists: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in made.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(numbers()), encoding="utf8")
        else:
            np.savez(folder / name, **numbers())
        print(f"made {folder / name}")


def read(file: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a golden file by name."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as found:
            return dict(found)
    found = json.loads(file.read_text(encoding="utf8"))
    return {key: np.array(value) for key, value in (found | found["metrics"]).items() if key != "metrics"}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns how far two arrays are apart, relative for values above 1; infinity where they cannot be compared."""
    if found.shape != expected.shape or found.dtype.kind != expected.dtype.kind:
        return np.inf
    if found.dtype.kind != "f":
        return 0.0 if np.array_equal(found, expected) else np.inf
    apart = float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1)))
    return apart if np.isfinite(apart) else np.inf


def compare(folder: Path) -> None:
    """Prints the largest difference of every file, and ends with an error if one is above the tolerance."""
    fine, compared = True, 0
    for file in sorted([*HERE.glob("*.npz"), HERE / "metrics.json"]):
        if not (folder / file.name).exists():
            print(f"{file.name}: not in {folder}, not compared")
            continue
        found, expected = read(folder / file.name), read(file)
        if NOT_MADE in expected:
            print(f"{file.name}: {NOT_MADE} cannot be made again, not compared")
            del expected[NOT_MADE]
        if "transformers" in expected:
            print(f"{file.name}: transformers {found.pop('transformers')}, was {expected.pop('transformers')}")
        for key in found.keys() ^ expected.keys():
            print(f"{file.name}: {key} is in one of the two only")
            fine = False
        apart = {key: difference(found[key], expected[key]) for key in found.keys() & expected.keys()}
        worst = max(apart, key=apart.get)
        print(f"{file.name}: {len(apart)} arrays, largest difference {apart[worst]:.1e} ({worst})")
        fine &= apart[worst] <= TOLERANCE
        compared += 1
    if not fine or not compared:
        raise SystemExit(f"the files are not the same to {TOLERANCE}" if compared else "nothing to compare")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder for what is made")
    parser.add_argument("--compare", action="store_true", help="compare instead of making")
    arguments = parser.parse_args()
    (compare if arguments.compare else make)(arguments.folder)
