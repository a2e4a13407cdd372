"""Writes files that are never seen half-written."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that appears under its name only when complete."""
    partial = path.with_name(path.name + ".partial")
    # the same bytes on every platform: transformers compares the code of two folders, and Git their texts
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)
