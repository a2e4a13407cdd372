"""A saved model as the transformers backends of vLLM and SGLang open and call it, checked against stubs of them.

Nothing is patched in: an engine registers its attention by name, loads the folder by the Auto classes with remote code,
prepares prompts with the processor, merges the image features itself, and calls the model without a mask.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import tiny_model, tiny_processor

from prefixvlm import PrefixVLMModel

ENGINE = Path(__file__).with_name("engine.py")
MODES = ("causal", "prefix")
P = 4  # tokens of an image


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model in each mode, all with the same weights."""
    found = {}
    for mode in (*MODES, "prefix_all_images", "bidirectional"):
        found[mode] = tmp_path_factory.mktemp(mode)
        tiny_model(mode).save_pretrained(found[mode])
        tiny_processor().save_pretrained(found[mode])
    return found


@pytest.fixture(scope="module")
def served(folders, tmp_path_factory):
    """What the stubs of both engines get, in a process without the package."""
    output = tmp_path_factory.mktemp("served") / "result.json"
    job = {"folders": {mode: str(folder) for mode, folder in folders.items()}, "output": str(output)}
    done = subprocess.run([sys.executable, str(ENGINE), json.dumps(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_the_model_is_what_a_backend_looks_for(served):
    for mode in MODES:
        found = served["vllm"][mode]
        assert found["class"] == "PrefixVLMModel"
        assert found["is_backend_compatible"]
        assert found["is_multimodal"]
        assert found["decoder"] == "Qwen2Model"


@pytest.mark.parametrize("mode", MODES)
def test_vllm_is_told_whether_images_are_open(served, mode):
    assert served["vllm"][mode]["is_mm_prefix_lm"] == (mode == "prefix")


@pytest.mark.parametrize("mode", MODES)
def test_vllm_computes_the_hidden_states_of_the_model(served, folders, mode):
    model = PrefixVLMModel.from_pretrained(folders[mode]).eval()
    found = served["vllm"][mode]
    inputs = {"input_ids": torch.tensor(found["input_ids"]), "pixel_values": torch.tensor(found["pixel_values"])}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(torch.tensor(found["hidden_states"]), expected, rtol=1e-4, atol=1e-5)


def test_the_two_masks_differ(served):
    causal, prefix = (torch.tensor(served["vllm"][mode]["hidden_states"]) for mode in MODES)
    assert (causal - prefix).abs().max() > 1e-3


def test_sglang_computes_the_hidden_states_of_a_causal_model(served, folders):
    model = PrefixVLMModel.from_pretrained(folders["causal"]).eval()
    found = served["sglang"]["causal"]
    inputs = {"input_ids": torch.tensor(found["input_ids"]), "pixel_values": torch.tensor(found["pixel_values"])}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(torch.tensor(found["hidden_states"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("engine", "mode"),
    [
        ("vllm", "prefix_all_images"),
        ("vllm", "bidirectional"),
        *(("sglang", mode) for mode in ("prefix", "prefix_all_images", "bidirectional")),
    ],
)
def test_a_mask_that_the_engine_cannot_make_is_refused(served, engine, mode):
    assert served[engine][mode]["error"].startswith(f"{engine} makes the attention mask by itself")
    assert f"attention_mode is {mode}" in served[engine][mode]["error"]


@pytest.mark.parametrize("mode", MODES)
def test_every_weight_that_the_engine_makes_is_in_the_checkpoint(served, folders, mode):
    from safetensors import safe_open

    with safe_open(folders[mode] / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    # the head is the engine's own; without it every parameter has to be filled
    assert set(served["vllm"][mode]["parameters"]) == saved - {"language_model.lm_head.weight"}


@pytest.mark.parametrize("mode", MODES)
def test_prompts_are_prepared_as_an_engine_reads_them(served, mode):
    found = served["vllm"][mode]["prompt"]
    image_token_id = found["image_token_id"]
    assert found["image_token_ids"] == [image_token_id]
    assert found["num_image_tokens"] == [P, P]
    assert found["num_image_patches"] == [1, 1]
    ids, types = found["input_ids"][0], found["mm_token_type_ids"][0]
    assert types == [int(token == image_token_id) for token in ids]
    assert sum(types) == 2 * P


def test_where_images_stand_is_said_as_by_processors_of_transformers():
    processor = tiny_processor()
    image = torch.zeros(3, 16, 16)
    token = processor.image_token
    text = f"a {token} b {token}c"
    encoded = processor(images=[image, image], text=[text, f"no {token}"][:1], return_text_replacement_offsets=True)
    (found,) = encoded["text_replacement_offsets"]
    expanded = text.replace(token, token * P)
    assert [one["type"] for one in found] == ["image", "image"]
    for one in found:
        assert text[slice(*one["span"])] == one["text"] == token
        assert expanded[slice(*one["new_span"])] == one["replacement"] == token * P
    if hasattr(transformers.ProcessorMixin, "get_text_with_replacements"):  # from 5.15 on
        own, offsets = processor.get_text_with_replacements([text], images_replacements=[token * P] * 2)
        assert own == [expanded]
        assert [{name: one[name] for name in found[0]} for one in offsets[0]] == found


def test_typed_image_tokens_are_no_places_of_images():
    processor = tiny_processor()
    text = processor.as_typed(processor.image_token) + processor.image_token
    encoded = processor(images=[torch.zeros(3, 16, 16)], text=text, return_text_replacement_offsets=True)
    ((found,),) = encoded["text_replacement_offsets"]
    assert found["span"] == (len(text) - len(processor.image_token), len(text))
