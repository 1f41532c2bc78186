"""A small tokenizer with Llama-3's control tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .data import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROWS = 4000


def train_tokenizer(data: Data) -> PreTrainedTokenizerFast:
    """Returns a lower-case byte-level BPE of ``ROWS`` tokens with Llama-3's control tokens, then ``<image>``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from e5v_st.model.prompts_e5v import PROMPTS, render

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for row in data.rows for text in (row["name"], *row["keywords"])]
    texts += [change for _, change, _ in data.composed] + [text for pair in data.glosses for text in pair]
    # The first word of a text has no space before it.
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
