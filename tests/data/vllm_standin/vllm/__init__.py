"""Stands for vLLM in tests: takes the arguments of vLLM 0.33.0 and no others, and computes with plain transformers.

``names.json`` holds the names, read from vLLM's source: entrypoints/llm.py, entrypoints/pooling/offline.py,
engine/arg_utils.py, config/pooler.py and inputs/llm.py. A test sets ``FAULT`` to have another token read.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NAMES = json.loads(Path(__file__).parents[1].joinpath("names.json").read_text(encoding="utf8"))
FAULT = ""


def check_names(what: str, given: dict[str, Any], known: list[str]) -> None:
    """Raises TypeError for a name that vLLM does not have."""
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(f"vLLM {NAMES['version']} knows no {what} {', '.join(unknown)}")


class LLM:
    """Plain transformers behind vLLM's calls."""

    def __init__(self, model: str, *, runner: str = "auto", dtype: str = "auto", **kwargs: Any) -> None:
        from transformers import AutoProcessor, LlavaNextForConditionalGeneration

        from .config import PoolerConfig

        check_names("argument of LLM", kwargs, NAMES["LLM"]["keywords"] + NAMES["EngineArgs"])
        pooler = kwargs["pooler_config"]
        assert isinstance(pooler, PoolerConfig)
        assert runner == "pooling"  # the other runner has no embed()
        assert kwargs["enable_prefix_caching"]
        assert kwargs["limit_mm_per_prompt"] == {"image": 1}
        assert 0 < kwargs["gpu_memory_utilization"] <= 1
        if kwargs.get("renderer_num_workers", 1) > 1 and kwargs.get("mm_processor_cache_gb", 4) > 0:
            raise ValueError("Cannot use --renderer-num-workers > 1 with the multimodal processor cache enabled")
        self.normalised = pooler.use_activation is not False
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.emptied: set[str] = set()
        self.llm_engine = SimpleNamespace(reset_encoder_cache=lambda: self.emptied.add("encoder"))

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """See vLLM's."""
        self.emptied.add("prefixes")
        return True

    def reset_mm_cache(self) -> None:
        """See vLLM's."""
        self.emptied.add("images")

    def embed(self, prompts: Any, *, use_tqdm: Any = True, pooling_params: Any = None) -> list[Any]:
        """Embeds prompts one by one."""
        assert self.emptied == {"prefixes", "images", "encoder"}, f"only {self.emptied} were emptied"
        self.emptied = set()
        return [self._embed(prompt) for prompt in prompts]

    @torch.inference_mode()
    def _embed(self, prompt: dict[str, Any]) -> Any:
        check_names("part of a prompt", prompt, NAMES["TokensPrompt"])
        ids, pixels = list(prompt["prompt_token_ids"]), {}
        image_id = self.model.config.image_token_id
        image = prompt.get("multi_modal_data", {}).get("image")
        assert ids.count(image_id) == int(image is not None)  # one for an image: vLLM repeats it
        if image is not None:
            read = self.processor(text=self.processor.image_token, images=[image], return_tensors="pt")
            pixels = {name: read[name] for name in ("pixel_values", "image_sizes")}
            place, length = ids.index(image_id), int((read["input_ids"] == image_id).sum())
            ids[place : place + 1] = [image_id] * length
        read_ids = ids[:-1] if FAULT == "another token" else ids
        outputs = self.model.model(input_ids=torch.tensor([read_ids]), **pixels, use_cache=False)
        state = outputs.last_hidden_state[0, -1].float()
        row = torch.nn.functional.normalize(state, dim=-1) if self.normalised else state
        found = SimpleNamespace(embedding=row.tolist())
        return SimpleNamespace(outputs=found, prompt_token_ids=ids, num_cached_tokens=0)
