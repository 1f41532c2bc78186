"""Items to token ids: user text is content, only the sentence is ever cut, an image takes as many ids as it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from .llava_next_e5v import count_tokens
from .prompts_e5v import IMAGE, SENTENCE, WRAPPERS, render

if TYPE_CHECKING:
    from transformers import LlavaNextConfig, PreTrainedTokenizerBase

    from .items_e5v import Item


class PromptTokenizer:
    """Tokenises whole prompts as the checkpoint's tokenizer would, but for control tokens inside the sentence.

    A prompt is tokenised as one string, because tokens may join the end of the sentence and what follows it. Where that
    finds more control tokens than the prompt has, some stand in the user's text: then the prompt is split at its own
    control tokens, and the text between them is read by a tokenizer that knows none.

    Args:
        tokenizer: The checkpoint's (a fast one). A BOS token is there only if it adds one.
        wrapper: A key of ``prompts_e5v.WRAPPERS``.
        config: The model's, for the image token and the number of positions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wrapper: str, config: LlavaNextConfig) -> None:
        self.tokenizer = tokenizer
        self.wrapper = wrapper
        self.config = config
        self.image_id = config.image_token_id
        if tokenizer.convert_tokens_to_ids(IMAGE) != self.image_id:
            raise ValueError(
                f"the tokenizer's {IMAGE} has the id {tokenizer.convert_tokens_to_ids(IMAGE)}, "
                f"but the model wants {self.image_id}: tokenizer and model are of different checkpoints"
            )
        self.control = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self.control_ids = set(self.control.values())
        self.split = re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")
        self.prefix = list(tokenizer("").input_ids)
        self.control_counts: dict[str, int] = {}
        self.lengths: dict[str, int] = {}

        plain = json.loads(tokenizer.backend_tokenizer.to_str())
        plain.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.plain = Tokenizer.from_str(json.dumps(plain))

    def __call__(
        self, items: Sequence[Item], image_layout: str, max_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``input_ids`` and ``attention_mask``, int64 ``(n, longest)``, padded on the right.

        Args:
            items: Items with their final templates.
            image_layout: Decides how many tokens an image takes.
            max_length: Most tokens of a prompt, without those of its images; the tokenizer's own limit where ``None``.

        Raises:
            ValueError: If a prompt does not fit even with no sentence in it.
        """
        rows = []
        for item, ids in zip(items, self._encode([(item.prompt, item.sentence or "") for item in items]), strict=True):
            counts, room = self._room(item, image_layout, max_length)
            if len(ids) > room:
                self.check(item, image_layout, max_length)
                ids = self._cut(item, room)
            rows.append(_expand(ids, self.image_id, counts))
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return input_ids, mask

    def check(self, item: Item, image_layout: str, max_length: int | None = None) -> None:
        """Raises ValueError if an item's prompt does not fit even with no sentence in it."""
        if item.prompt not in self.lengths:
            self.lengths[item.prompt] = len(self._encode([(item.prompt, "")])[0])
        _, room = self._room(item, image_layout, max_length)
        if self.lengths[item.prompt] > room:
            raise ValueError(
                f"the prompt takes {self.lengths[item.prompt]} tokens without any sentence, but there is room for "
                f"{max(room, 0)}: raise max_seq_length, or give fewer images at once"
            )

    def _room(self, item: Item, image_layout: str, max_length: int | None) -> tuple[list[int], int]:
        """Returns the tokens of each image, and how many the prompt may take, each image counted as one."""
        counts = [count_tokens(image.height, image.width, self.config, image_layout) for image in item.images]
        limit = min(max_length or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        return counts, min(limit, self.config.text_config.max_position_embeddings - sum(counts) + len(counts))

    def _encode(self, prompts: Sequence[tuple[str, str]]) -> list[list[int]]:
        texts = [render(template, self.wrapper, sentence) for template, sentence in prompts]
        encoded = self.tokenizer(texts, return_attention_mask=False).input_ids
        for row, (template, sentence) in enumerate(prompts):
            if sum(index in self.control_ids for index in encoded[row]) > self._control_count(template):
                encoded[row] = self._encode_pieces(template, sentence)
        return encoded

    def _control_count(self, template: str) -> int:
        if template not in self.control_counts:
            ids = self.tokenizer(render(template, self.wrapper)).input_ids
            self.control_counts[template] = sum(index in self.control_ids for index in ids)
        return self.control_counts[template]

    def _encode_pieces(self, template: str, sentence: str) -> list[int]:
        ids = list(self.prefix)
        for piece in self.split.split(WRAPPERS[self.wrapper].replace("{}", template)):
            if piece in self.control:
                ids.append(self.control[piece])
            elif piece:
                ids += self.plain.encode(piece.replace(SENTENCE, sentence), add_special_tokens=False).ids
        return ids

    def _cut(self, item: Item, room: int) -> list[int]:
        """Encodes the prompt with as much of the sentence as fits into ``room`` tokens; without any, it does."""
        sentence = item.sentence or ""
        ends = [end for _, end in self.plain.encode(sentence, add_special_tokens=False).offsets]
        keep = len(ends)
        ids = self._encode([(item.prompt, sentence)])[0]
        while len(ids) > room:
            keep = max(0, min(keep - 1, keep - (len(ids) - room)))
            ids = self._encode([(item.prompt, sentence[: ends[keep - 1]] if keep else "")])[0]
        return ids


def _expand(ids: list[int], image_id: int, counts: Sequence[int]) -> list[int]:
    """Repeats the n-th image id ``counts[n]`` times."""
    if not counts:
        return ids
    left = iter(counts)
    return [index for each in ids for index in ([each] * next(left) if each == image_id else [each])]
