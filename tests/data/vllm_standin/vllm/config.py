"""See ``__init__.py``."""

from __future__ import annotations

from typing import Any

from . import NAMES, check_names


class PoolerConfig:
    """Fields of vLLM's. ``normalize`` was one in earlier versions."""

    def __init__(self, **fields: Any) -> None:
        check_names("field of PoolerConfig", fields, NAMES["PoolerConfig"])
        assert fields["seq_pooling_type"] in NAMES["seq_pooling_types"]
        self.seq_pooling_type = fields["seq_pooling_type"]
        self.use_activation = fields.get("use_activation")
