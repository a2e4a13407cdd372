"""The folders of real tokenizers; what asks for one that is not on this machine is skipped."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("qwen2.5", "qwen3", "llama3_1", "gemma3", "smollm2")
PLACES = (
    Path(os.environ.get("PREFIXVLM_TOKENIZERS", ROOT / "build" / "tokenizers")),  # what `make build/tokenizers` fills
    ROOT / "build" / "real",  # SmolLM2, as `make real` converts it
    ROOT.parent / "shared" / "tokenizers",
)


def tokenizer_folder(family: str) -> Path:
    """The folder of one of `FAMILIES`, which `AutoTokenizer` loads; skips where there is none."""
    assert family in FAMILIES
    for place in PLACES:
        if (place / family / "tokenizer.json").is_file():
            return place / family
    pytest.skip(f"no tokenizer of {family}; `make build/tokenizers` fetches all but qwen2.5 and smollm2 (`make real`)")
