"""Finds the images of a folder, and says what was left out."""

from __future__ import annotations

import os
from collections import Counter, deque
from pathlib import Path

from ..files import printable
from ..model.images_e5v import REFUSED_SUFFIXES, image_suffixes

#: Kinds of files that a message names; the rest is counted together.
NAMED_KINDS = 8


def find_images(folder: Path) -> tuple[list[Path], str]:
    """Finds all files below a folder that Pillow reads, by their suffixes.

    Links are followed, to files and to folders. Each folder is taken once, under its own name where it has one below
    ``folder``, so that a loop of links ends.

    Args:
        folder: Where to look.

    Returns:
        The images, sorted, and a line that says what was left out and why; empty where nothing was.
    """
    suffixes = image_suffixes()
    images: list[Path] = []
    others: Counter[str] = Counter()
    again, unreadable = 0, []
    seen: set[str] = set()
    # What is reached by links alone comes last
    waiting = deque([str(folder)])
    while waiting:
        start = waiting.popleft()
        for place, folders, files in os.walk(start, onerror=lambda error: unreadable.append(str(error.filename))):
            if os.path.realpath(place) in seen:
                again += place == start
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            folders.sort()
            waiting.extend(path for name in folders if os.path.islink(path := os.path.join(place, name)))
            for name in files:
                suffix = os.path.splitext(name)[1].lower()
                if suffix in suffixes:
                    images.append(Path(place, name))
                else:
                    others[suffix] += 1
    return sorted(images), _say_left_out(others, again, unreadable)


def _say_left_out(others: Counter[str], again: int, unreadable: list[str]) -> str:
    parts = []
    if others:
        refused = [suffix for suffix in others if suffix in REFUSED_SUFFIXES]
        common = [suffix for suffix, _ in others.most_common() if suffix not in refused][:NAMED_KINDS]
        kinds = [f"{others[suffix]} {suffix} ({REFUSED_SUFFIXES[suffix]})" for suffix in sorted(refused)]
        kinds += [f"{others[suffix]} {suffix or 'without a suffix'}" for suffix in common]
        rest = others.total() - sum(others[suffix] for suffix in refused + common)
        kinds += [f"{rest} of other kinds"] * bool(rest)
        parts.append(f"{others.total()} files that Pillow does not read as images: {', '.join(kinds)}")
    if again:
        parts.append(f"{again} links to folders that are here already")
    if unreadable:
        parts.append(f"{len(unreadable)} folders that cannot be opened: {', '.join(sorted(unreadable)[:NAMED_KINDS])}")
    return printable(f"left out: {'; '.join(parts)}") if parts else ""
