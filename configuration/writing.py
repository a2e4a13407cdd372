"""Writes files that are never seen half-written."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that appears under its name only when complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
