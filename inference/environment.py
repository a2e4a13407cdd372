"""Versions of the packages that results depend on."""

import platform

import torch
import transformers


def versions() -> dict[str, str]:
    """Versions of torch, transformers and Python, for the records of runs and measurements."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
