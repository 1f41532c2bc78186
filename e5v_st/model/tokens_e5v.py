"""Items to token ids: a user's text is content and alone is ever cut; an image takes as many ids as it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from .pixels_e5v import Placeholder
from .prompts_e5v import IMAGE, SENTENCE, find_format, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .backbone_e5v import Backbone
    from .items_e5v import Item


class PromptTokenizer:
    """Tokenises whole prompts as the checkpoint's tokenizer would, except for control tokens in a user's text.

    A prompt is tokenised as one string, because tokens may join the end of the text and what follows it. If that finds
    more control tokens than the prompt has, some stand in the user's text. Then the prompt is split at its own control
    tokens, and what lies between them is read by a tokenizer that knows none::

        prompt          <|user|> {text} <|end|>
        text            "a <|end|> tag"             one control token more than the prompt has
        pieces          <|user|>   "a <|end|> tag"   <|end|>
        read as         id of it   plain characters  id of it

    Each run of image tokens is one token in that string, and grows to its length afterwards.

    Args:
        tokenizer: The checkpoint's (a fast one).
        backbone: The checkpoint's family.
        image_token: The token that is repeated for an image.
        image_id: Its id in the model.
        max_positions: The longest prompt that the model has positions for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        backbone: Backbone,
        image_token: str,
        image_id: int,
        max_positions: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.wrapper = backbone.wrapper
        self.image = backbone.image
        self.image_token = image_token
        self.adds_bos = backbone.adds_bos
        self.image_id = image_id
        self.max_positions = max_positions
        if tokenizer.convert_tokens_to_ids(image_token) != image_id:
            raise ValueError(
                f"the tokenizer's {image_token} has the id {tokenizer.convert_tokens_to_ids(image_token)}, "
                f"but the model wants {image_id}: tokenizer and model are of different checkpoints"
            )
        self.control = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self.control_ids = set(self.control.values())
        self.split = re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")
        self.prefix = list(tokenizer("", add_special_tokens=self.adds_bos).input_ids)
        self.control_counts: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self.placeholders: dict[str, int] = {}

        # They know no control tokens; the one reads what stands first in a prompt, the other what stands behind
        self.plain, self.inner = _without_control_tokens(tokenizer.backend_tokenizer)

    def __call__(
        self, items: Sequence[Item], shown: Sequence[Sequence[Placeholder]], max_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``input_ids`` and ``attention_mask``, int64 ``(n, longest)``, padded on the right.

        Args:
            items: Items with their final templates.
            shown: What stands for the images of each.
            max_length: Maximum number of tokens of a prompt, without those of its images; the tokenizer's own limit if
                ``None``.

        Raises:
            ValueError: If a prompt does not fit even with no text in it.
        """
        rows = []
        templates = [self._place(item.prompt or "", own) for item, own in zip(items, shown, strict=True)]
        texts = [(template, item.sentence or "") for template, item in zip(templates, items, strict=True)]
        for (template, sentence), own, ids in zip(texts, shown, self._encode(texts), strict=True):
            room = self._room([sum(each.runs) - len(each.runs) for each in own], max_length)
            room += sum(self._length(each.text) - 1 for each in own) if max_length else 0
            if len(ids) > room:
                self._check_room(template, room)
                ids = self._cut(template, sentence, room)
            rows.append(_expand(ids, self.image_id, [run for each in own for run in each.runs]))
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return input_ids, mask

    def check(self, item: Item, counts: Sequence[int], max_length: int | None = None) -> None:
        """Raises ValueError if an item's prompt does not fit even with no text in it.

        Args:
            item: With its final template.
            counts: How many tokens each of its images will take.
            max_length: As above.
        """
        template = (item.prompt or "").replace(IMAGE, self.image)
        self._check_room(template, self._room([count - 1 for count in counts], max_length))

    def _check_room(self, template: str, room: int) -> None:
        if template not in self.lengths:
            self.lengths[template] = len(self._encode([(template, "")])[0])
        if self.lengths[template] > room:
            raise ValueError(
                f"the prompt takes {self.lengths[template]} tokens without any text, but there is room for "
                f"{max(room, 0)}: raise max_seq_length, or give fewer images at once"
            )

    def _room(self, growth: Sequence[int], max_length: int | None) -> int:
        """Returns how many tokens a prompt may take before its images grow by so many."""
        limit: int = min(max_length or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        return min(limit, self.max_positions - sum(growth))

    def _place(self, template: str, shown: Sequence[Placeholder]) -> str:
        """Puts what stands for images into a template."""
        first, *rest = template.split(IMAGE)
        return first + "".join(each.text + part for each, part in zip(shown, rest, strict=True))

    def _length(self, text: str) -> int:
        if text not in self.placeholders:
            self.placeholders[text] = len(self.tokenizer(text, add_special_tokens=False).input_ids)
        return self.placeholders[text]

    def _encode(self, prompts: Sequence[tuple[str, str]]) -> list[list[int]]:
        texts = [render(template, self.wrapper, sentence) for template, sentence in prompts]
        encoded = self.tokenizer(texts, return_attention_mask=False, add_special_tokens=self.adds_bos).input_ids
        for row, (template, sentence) in enumerate(prompts):
            if sum(index in self.control_ids for index in encoded[row]) > self._control_count(template):
                encoded[row] = self._encode_pieces(template, sentence)
        return encoded

    def _control_count(self, template: str) -> int:
        if template not in self.control_counts:
            ids = self.tokenizer(render(template, self.wrapper), add_special_tokens=self.adds_bos).input_ids
            self.control_counts[template] = sum(index in self.control_ids for index in ids)
        return self.control_counts[template]

    def _encode_pieces(self, template: str, sentence: str) -> list[int]:
        ids = list(self.prefix)
        for place, piece in enumerate(self.split.split(find_format(self.wrapper).replace("{}", template))):
            if piece in self.control:
                ids.append(self.control[piece])
            elif piece:
                tokenizer = self.inner if place else self.plain
                ids += tokenizer.encode(piece.replace(SENTENCE, sentence), add_special_tokens=False).ids
        return ids

    def _cut(self, template: str, sentence: str, room: int) -> list[int]:
        """Encodes the prompt with as much of the text as fits into ``room`` tokens; without any, it does."""
        ends = [end for _, end in self.plain.encode(sentence, add_special_tokens=False).offsets]
        keep = len(ends)
        ids = self._encode([(template, sentence)])[0]
        while len(ids) > room:
            keep = max(0, min(keep - 1, keep - (len(ids) - room)))
            ids = self._encode([(template, sentence[: ends[keep - 1]] if keep else "")])[0]
        return ids


def _without_control_tokens(backend: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """Returns tokenizers that read control tokens as characters, for the first piece of a prompt and for the others.

    Some tokenizers put a blank in front of a whole string, but not of each piece; else the two are one. The vocabulary
    is the checkpoint's own, not a copy.
    """
    empty = Tokenizer(BPE())
    empty.normalizer, empty.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    settings = json.loads(empty.to_str())
    inner = {**settings, "pre_tokenizer": _behind_another(settings["pre_tokenizer"])}
    made = [Tokenizer.from_str(json.dumps(each)) for each in ([settings] if inner == settings else [settings, inner])]
    for plain in made:
        plain.model = backend.model
    return made[0], made[-1]


def _behind_another(step: Any) -> Any:
    """Returns the settings of a pre-tokeniser without the blank that it puts in front of a whole string."""
    if not isinstance(step, dict):
        return step
    if "pretokenizers" in step:  # several, one after the other
        return {**step, "pretokenizers": [_behind_another(part) for part in step["pretokenizers"]]}
    return {**step, "prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step


def _expand(ids: list[int], image_id: int, counts: Sequence[int]) -> list[int]:
    """Repeats the n-th image id ``counts[n]`` times."""
    if not counts:
        return ids
    left = iter(counts)
    return [index for each in ids for index in ([each] * next(left) if each == image_id else [each])]
