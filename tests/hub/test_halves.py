"""A model of every kind of encoder, and of decoder, loads where this package is not installed, on both versions of
transformers.

What the other version saves or loads needs a second Python with this package: PREFIXVLM_OTHER_PYTHON=/path/to/python.
"""

import os
from pathlib import Path

import decoders
import encoders
import pytest
import torch
from joined import save_joined

from prefixvlm.modeling_vlm.vision_tower_prefix_vlm import FINAL_NORMS

DOCS = Path(__file__).parents[2] / "docs" / "BACKBONES.md"
OTHER_PYTHON = os.environ.get("PREFIXVLM_OTHER_PYTHON")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, run_clean, measure, photo):
    """What the one who saves and the one who loads say of each model, by its half and by who saved and loaded it."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))

    def folders(root) -> dict:
        return {name: str(root / name) for name in (*encoders.ENCODERS, *decoders.DECODERS)}

    saved = {"here": save_joined(here, measure, photo)}
    loaded = {"here": run_clean({"folders": folders(here)})}
    if OTHER_PYTHON:
        save = {"folder": str(there), "helpers": str(Path(encoders.__file__).parent)}
        far = run_clean({"folders": folders(here), "save_joined": save}, python=OTHER_PYTHON)
        saved |= {"here, loaded there": saved["here"], "there": far["joined"]}
        loaded |= {"here, loaded there": far, "there": run_clean({"folders": folders(there)})}
    return saved, loaded


@pytest.mark.parametrize("name", [*encoders.ENCODERS, *decoders.DECODERS])
@pytest.mark.parametrize("direction", ["here", "here, loaded there", "there"])
def test_a_clean_process_sees_the_same_model(direction, name, pairs):
    if direction != "here" and not OTHER_PYTHON:
        pytest.skip("PREFIXVLM_OTHER_PYTHON names no Python with other transformers")
    saved, loaded = (one[direction][name] for one in pairs)
    # two questions, 6 x 6 patches in groups of four, or 2 x 2 patches
    assert (saved["input_ids"] == 1).sum() == 2 * (9 if name in encoders.ENCODERS else 4)
    for key in ("input_ids", "attention_mask", "pixel_values", "generated"):
        assert torch.equal(saved[key], loaded[key]), key
    valid = saved["attention_mask"].bool()
    torch.testing.assert_close(loaded["logits"][valid], saved["logits"][valid], rtol=0, atol=1e-4)


def test_the_table_in_the_docs_has_the_encoders_that_are_tried_here():
    rows = [
        f"| {name} | `{type(make()).__name__}` | {'yes' if _kind(make()) in FINAL_NORMS else 'no'} | yes |"
        for name, make in encoders.ENCODERS.items()
    ]
    table = DOCS.read_text(encoding="utf-8").split("|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert table[:-1] == rows
    assert table[-1].startswith("| timm")


def _kind(model) -> str:
    return getattr(model.config, "vision_config", model.config).model_type
