"""Checks of loaded weights: all there, all numbers, and where a forward pass finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_weights(model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuses a model that would embed with weights that were never there.

    Args:
        model: The loaded model.
        found: What ``from_pretrained(..., output_loading_info=True)`` said of it.

    Raises:
        ValueError: If weights are missing, of the wrong shape or not a number.
    """
    for problem in ("missing_keys", "mismatched_keys"):
        if found.get(problem):
            names = sorted(map(str, found[problem]))
            raise ValueError(f"the checkpoint has {len(names)} {problem.replace('_', ' ')}: {', '.join(names[:5])}")
    for name, weight in model.named_parameters():
        values = find_scales(weight)
        if not values.is_floating_point() or values.device.type == "meta":
            continue
        # The smallest of a tensor is NaN if any is: no second tensor of that size
        if not all(bound.isfinite() for bound in values.aminmax()):
            raise ValueError(f"the weights of {name} are not all numbers: the checkpoint is broken")


def find_scales(weight: Any) -> Any:
    """The scales of a quantised weight, which are NaN where a weight was; any other weight as it is."""
    state = getattr(weight, "quant_state", None)  # bitsandbytes in 4 bits, whose scales may be quantised in turn
    found = (getattr(weight, "SCB", None), getattr(weight, "scale", None), getattr(state, "offset", None))
    return next((values for values in (*found, getattr(state, "absmax", None)) if values is not None), weight)


def check_offloading(model: PreTrainedModel) -> None:
    """Raises ValueError if a device map has offloaded what a forward pass reads without asking accelerate for it."""
    newline = getattr(model, "image_newline", None)  # a model for texts alone has none
    if newline is not None and newline.device.type == "meta" and hasattr(model, "hf_device_map"):
        raise ValueError(
            'the device_map offloads image_newline, which must stay in memory: want device_map="auto", or a map with '
            "image_newline on a device"
        )
