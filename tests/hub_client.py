"""What tests of the hub have in common: tokens, and how a process takes the local server for the hub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub_server import HubServer

TOKEN = "hf_goodtokenforme"
TOKENS = {
    TOKEN: {"name": "me", "role": "write"},
    "hf_reader": {"name": "me", "role": "read"},
    "hf_other": {"name": "you", "role": "write"},
}


def connect(hub: HubServer, home: Path, patch: pytest.MonkeyPatch, token: str = TOKEN) -> None:
    """Makes this process, and those that it starts, take the server for the hub."""
    hub.attach(patch)
    hub.tokens = TOKENS
    patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name, value in hub.env(home, token=token).items():
        patch.setenv(name, value)


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> content of every file below a folder."""
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}
