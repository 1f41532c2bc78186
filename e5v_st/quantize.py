"""What ``from_pretrained`` needs to quantise the language model to 8 or 4 bits while a model is loaded.

The vision tower and the projector stay as they are: in most models they are a few percent of the weights.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

#: mode -> the library that does it
LIBRARIES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp8": "torchao"}
#: Everything but the language model, in any family; see ``model/backbone_e5v.py``.
SKIPPED = ["vision_tower", "vision_model", "visual", "multi_modal_projector", "connector", "embed_vision"]


def quantization(mode: str, device: str | None = None, dtype: Any = None) -> dict[str, Any]:
    """Returns what ``from_pretrained`` needs to quantise a model while it is loaded.

    Args:
        mode: ``"int8"`` (LLM.int8), ``"nf4"`` (QLoRA's, with double quantisation) or ``"fp8"`` (weights alone, computed
            in the model's dtype).
        device: Where the model goes. With ``None``, a GPU if there is one.
        dtype: What the model computes in, if that is known.

    Raises:
        ValueError: If there is no such mode, or its library is not installed.

    Example:
        >>> sorted(quantization("nf4", "cpu"))
        ['device_map', 'quantization_config']
    """
    if mode not in LIBRARIES:
        raise ValueError(f"got quantize={mode!r}, want one of {', '.join(LIBRARIES)}")
    if find_spec(LIBRARIES[mode]) is None:
        raise ValueError(f"quantize={mode!r} needs {LIBRARIES[mode]}: pip install 'e5v-st[quant]'")
    import torch
    from sentence_transformers.util import get_device_name
    from transformers import BitsAndBytesConfig, TorchAoConfig

    device = str(device or get_device_name())
    if mode == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig

        config: Any = TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=SKIPPED)
    else:
        # One warning for each matrix product would say that activations are rounded to float16, as LLM.int8 does
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        half = torch.bfloat16 if device.startswith("cuda") else torch.float32
        config = BitsAndBytesConfig(
            load_in_8bit=mode == "int8",
            load_in_4bit=mode == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "", half),
            llm_int8_skip_modules=SKIPPED,
        )
    return {"quantization_config": config, "device_map": {"": device}}
