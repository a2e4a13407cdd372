"""What transformers 4 saves, transformers 5 loads without this package, and the other way round.

Needs a second Python with this package and the other version: PREFIXVLM_OTHER_PYTHON=/path/to/python.
"""

import os

import pytest
import tiny
import torch
import transformers

OTHER_PYTHON = os.environ.get("PREFIXVLM_OTHER_PYTHON")
pytestmark = pytest.mark.skipif(not OTHER_PYTHON, reason="PREFIXVLM_OTHER_PYTHON names no Python with other transformers")


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory, run_clean, measure, photo):
    """(saved here, loaded there) and (saved there, loaded here), and the other version."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    model, processor = tiny.tiny_model(), tiny.tiny_processor()
    model.save_pretrained(here)
    processor.save_pretrained(here)
    save = {"folder": str(there), "tiny": tiny.__file__}
    far = run_clean({"folders": {"loaded": str(here)}, "save": save}, python=OTHER_PYTHON)
    near = run_clean({"folders": {"loaded": str(there)}})
    pairs = {"saved here": (measure(model, processor, photo), far["loaded"]), "saved there": (far["saved"], near["loaded"])}
    return pairs, far["version"]


@pytest.mark.parametrize("direction", ["saved here", "saved there"])
def test_the_other_version_sees_the_same_model(both_ways, direction):
    saved, loaded = both_ways[0][direction]
    assert both_ways[1].split(".")[0] != transformers.__version__.split(".")[0]
    for name in ("input_ids", "attention_mask", "pixel_values", "generated"):
        assert torch.equal(saved[name], loaded[name]), name
    assert saved["answers"] == loaded["answers"]
    valid = saved["attention_mask"].bool()
    torch.testing.assert_close(loaded["logits"][valid], saved["logits"][valid], rtol=0, atol=1e-5)


def test_rope_theta_would_show(both_ways, measure, photo):
    """What 4.x silently makes of a configuration that 5.x wrote differs by far more than the tolerance above."""
    model = tiny.tiny_model()
    layer = model.get_decoder().rotary_emb
    torch.testing.assert_close(layer.inv_freq, 1_000_000.0 ** -(torch.arange(0, 12, 2) / 12))
    layer.inv_freq.copy_(10_000.0 ** -(torch.arange(0, 12, 2) / 12))
    saved = both_ways[0]["saved here"][0]
    assert not torch.allclose(measure(model, tiny.tiny_processor(), photo)["logits"], saved["logits"], atol=1e-3)
