"""What the published training script really fed its model, to repeat the published run.

Four things in ``ft_llm.py`` of kongds/E5-V differ from inference:

1. The underscores of the template became spaces after the chat format was put around it. So its control tokens are
   plain text: ``<|start_header_id|>`` became ``<|start header id|>``.
2. The end of the template was stripped.
3. The text was decoded from its first 32 tokens, which removes spaces before punctuation.
4. The attention mask is ``ids > 0``. Padding, which stands on the left and is a control token, is thus attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from e5v_st.model.prompts_e5v import PROMPTS, SENTENCE, WRAPPERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Widths are rounded up to a multiple of this.
MULTIPLE = 8


def released_prompt(sentence: str, wrapper: str = "llama3") -> str:
    """Returns the prompt that the published script made of a text (already cut).

    Mistral's chat format has no underscores; there only the end is stripped.
    """
    template = WRAPPERS[wrapper].replace("{}", PROMPTS["text"].rstrip(" "))
    return template.replace("_", " ").replace(SENTENCE, sentence).strip()


@dataclass
class ReleasedCollator(SentenceTransformerDataCollator):
    """Makes batches as the published script did: all columns padded on the left to one width.

    Args:
        preprocess_fn: Unused; the collator that this one replaces has it.
        tokenizer: The checkpoint's.
        wrapper: The chat format, a key of ``prompts_e5v.WRAPPERS``.
        max_tokens: Maximum number of tokens of a text.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    wrapper: str = "llama3"
    max_tokens: int = 32

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns ``input_ids``, ``attention_mask`` and ``position_ids`` ``(n, tokens)`` for each column."""
        pad = self.tokenizer.pad_token_id
        columns = {}
        for position, name in enumerate(features[0]):
            rows = self._tokenize([row[name] for row in features])
            # The positives went through a field for labels, whose padding the script then set to 0
            columns[name] = _pad_left(rows, 0 if position == 1 else pad, MULTIPLE)
        width = max(ids.shape[1] for ids in columns.values())
        batch: dict[str, Any] = {}
        for name, ids in columns.items():
            full = torch.nn.functional.pad(ids, (width - ids.shape[1], 0), value=pad)
            batch[f"{name}_input_ids"] = full
            batch[f"{name}_attention_mask"] = (full > 0).long()
            batch[f"{name}_position_ids"] = torch.arange(width).expand_as(full).clone()
        return batch

    def _tokenize(self, sentences: Sequence[str]) -> list[list[int]]:
        cut = self.tokenizer(
            list(sentences), truncation=True, max_length=self.max_tokens, padding=False, add_special_tokens=False
        ).input_ids
        decoded = self.tokenizer.batch_decode(cut, clean_up_tokenization_spaces=False)
        texts = [self.tokenizer.clean_up_tokenization(text) for text in decoded]
        return self.tokenizer([released_prompt(text, self.wrapper) for text in texts], padding=False).input_ids


def _pad_left(rows: Sequence[Sequence[int]], pad: int, multiple: int) -> torch.Tensor:
    width = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
