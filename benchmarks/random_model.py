"""A LLaVA-NeXT with random weights in the published format, for the benchmarks: small, but right in its proportions.

Vocabulary: 7.5 % of the language model's layers, as 128,256 rows are in Llama-3-8B. The tokenizer knows every prompt
and the benchmarks' words, so that a prompt has about as many tokens as with Llama-3's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

GOLDENS = Path(__file__).parents[1] / "tests" / "data" / "goldens"
LANGUAGE = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
TOWER = {"num_hidden_layers": 3, "hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
VOCABULARY = 2500
#: Those of royokong/e5-v; the embedding has a row for the image token besides.
LANGUAGE_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TOWER_8B = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
VOCABULARY_8B = 128257
WORDS = "a the man woman dog sits runs on in near red small street table ball".split()  # noqa: SIM905


def make_checkpoint(folder: Path) -> Path:
    """Writes the checkpoint, from a seed. Its tiles are the real ones (336 pixels, up to 672x672).

    Args:
        folder: New.
    """
    import torch
    from transformers import AutoTokenizer, LlavaNextConfig, LlavaNextForConditionalGeneration

    from e5v_st.prompts_e5v import PROMPTS, render

    golden = GOLDENS / "realgrid"
    torch.manual_seed(0)
    shutil.copytree(golden, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    lines = [render(prompt, "llama3", " ".join(WORDS)) for prompt in PROMPTS.values()] * 9
    tokenizer = AutoTokenizer.from_pretrained(golden).train_new_from_iterator(lines, VOCABULARY - 1)
    tokenizer.save_pretrained(folder)
    settings = json.loads((golden / "config.json").read_text())
    settings["text_config"] |= LANGUAGE
    settings["vision_config"] |= TOWER
    settings["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings))
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    model.save_pretrained(folder)
    return folder
