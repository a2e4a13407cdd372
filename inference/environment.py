"""What a figure or a run depends on beside the code: the versions of the packages below it."""

import platform

import torch
import transformers


def versions() -> dict[str, str]:
    """Of the packages that a figure depends on, for the records of runs."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
