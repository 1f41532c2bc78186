"""Real tokenizers of published checkpoints, from packages that are installed for tests and never part of this project.

``make test`` installs them (``TOKENIZERS`` in the Makefile), without what they need and where nothing imports them: one
of them would change which tokenizer transformers takes.

    Llama 3        llama-models     Meta Llama 3 Community License     royokong/e5-v
    Qwen           qwen-agent       Apache-2.0                         Qwen2-VL to Qwen3-VL, InternVL, LLaVA-OneVision
    Mistral 7B     mistral-common   Apache-2.0                         LLaVA-NeXT on Mistral
    Tekken         mistral-common   Apache-2.0                         Mistral Small 3.1
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

#: File in an installed package -> its SHA-256.
FILES = {
    "llama_models/llama3/tokenizer.model": "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    "qwen_agent/utils/qwen.tiktoken": "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    "mistral_common/data/tokenizer.model.v1": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "mistral_common/data/tekken_240911.json": "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
}
#: Qwen3-VL's control tokens, from 151643 on; the first 14 are Qwen2-VL's. Then those of LLaVA-OneVision and InternVL.
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN += [f"<|{part}_{end}|>" for part in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
QWEN += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"]
QWEN += ["<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>"]
QWEN += ["</tool_response>", "<think>", "</think>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>"]
#: Mistral Small 3.1's, from 0 on; the rest of a thousand have no name.
TEKKEN = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
TEKKEN += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"]
TEKKEN += ["[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
TEKKEN += [f"<SPECIAL_{number}>" for number in range(len(TEKKEN), 1000)]


def installed(name: str) -> Path:
    """Returns a file of :data:`FILES`, after a look at its content."""
    file = Path(sys.prefix) / "tokenizers" / name
    assert file.exists(), f"{file} is missing: run `make test`, whose TOKENIZERS are installed there"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == FILES[name]
    return file


@cache
def llama3() -> PreTrainedTokenizerFast:
    """Llama 3's, with the ``<image>`` of LLaVA-NeXT."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>"]
    specials += [f"<|reserved_special_token_{i}|>" for i in range(4)]
    specials += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    specials += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    file = installed("llama_models/llama3/tokenizer.model")
    backend = TikTokenConverter(str(file), extra_special_tokens=specials).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|eot_id|>", pad_token="<|eot_id|>", model_max_length=8192
    )
    tokenizer.add_tokens(["<image>"])
    return tokenizer


@cache
def qwen() -> Qwen2Tokenizer:
    """Qwen3-VL's in transformers' own class for it, with the tokens that other families add behind.

    What Qwen2-VL lacks is no part of its prompts.
    """
    file = installed("qwen_agent/utils/qwen.tiktoken")
    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(file))
    tokenizer = Qwen2Tokenizer(vocabulary, merges, model_max_length=8192)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN])
    return tokenizer


def _pieces(content: bytes) -> Iterator[tuple[str, float]]:
    """Yields what a SentencePiece model's file begins with: messages of a text and a score, a float."""
    place = 0
    while content[place] == 0x0A:  # the mark of a message; its length is one byte, since all are short
        message = content[place + 2 : place + 2 + content[place + 1]]
        text, score = message[2 : 2 + message[1]], message[3 + message[1] : 7 + message[1]]
        yield text.decode(), struct.unpack("<f", score)[0]
        place += 2 + len(message)


@cache
def mistral(legacy: bool = False) -> LlamaTokenizer:
    """Mistral 7B's, of the kind of Llama 2's, with the ``<image>`` of LLaVA-NeXT.

    Args:
        legacy: Whether every piece between control tokens begins with a blank, as older files say.
    """
    content = installed("mistral_common/data/tokenizer.model.v1").read_bytes()
    scores = dict(_pieces(content))
    vocabulary = {piece: index for index, piece in enumerate(scores)}
    merges = generate_merges(vocabulary, scores)
    tokenizer = LlamaTokenizer(vocabulary, merges, legacy=legacy, pad_token="</s>", model_max_length=8192)
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def _tekken_ranks() -> tuple[str, dict[bytes, int]]:
    content = json.loads(installed("mistral_common/data/tekken_240911.json").read_bytes())
    ordinary = content["config"]["default_vocab_size"] - len(TEKKEN)
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in content["vocab"][:ordinary]}
    return content["config"]["pattern"], ranks


class _FromRanks(TikTokenConverter):
    """Converts a vocabulary that was read already."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return _tekken_ranks()[1]


@cache
def tekken() -> PreTrainedTokenizerFast:
    """Mistral Small 3.1's, whose control tokens come first."""
    backend = _FromRanks(pattern=_tekken_ranks()[0]).converted()
    settings: dict[str, Any] = json.loads(backend.to_str())
    own = {token: index + len(TEKKEN) for token, index in settings["model"]["vocab"].items()}
    settings["model"]["vocab"] = {**{token: index for index, token in enumerate(TEKKEN)}, **own}
    backend = Tokenizer.from_str(json.dumps(settings))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in TEKKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=8192
    )


# ---- the same files, read by other code ----


@cache
def tiktoken_of(name: str) -> tuple[tiktoken.Encoding, int]:
    """Returns the encoding of ``"llama3"``, ``"qwen"`` or ``"tekken"``, and what its ids are shifted by."""
    if name == "tekken":
        pattern, ranks = _tekken_ranks()
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), len(TEKKEN)
    from tiktoken.load import load_tiktoken_bpe

    # As Meta and Qwen state them: Llama 3 reads up to three digits at once, Qwen one
    digits = r"\p{N}" if name == "qwen" else r"\p{N}{1,3}"
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    file = next(file for file in FILES if file.startswith({"qwen": "qwen_agent", "llama3": "llama_models"}[name]))
    ranks = load_tiktoken_bpe(str(installed(file)))
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), 0


def encode_plainly(name: str, pieces: Sequence[str | int]) -> list[int]:
    """Returns the ids of texts and control tokens in a row, without any of our code.

    Args:
        name: See :func:`tiktoken_of`.
        pieces: A control token is given by its id.
    """
    encoding, shift = tiktoken_of(name)
    ids = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        else:  # Qwen's own code puts a text into this form first
            text = unicodedata.normalize("NFC", piece) if name == "qwen" else piece
            ids += [index + shift for index in encoding.encode_ordinary(text)]
    return ids
