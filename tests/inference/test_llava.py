"""A LLaVA that was saved by transformers becomes a PrefixVLM with its logits, prompts, pictures and answers."""

import json

import pytest
import torch
import yaml
from llavas import KINDS, TEXT, save_llava
from PIL import Image
from transformers import LlavaForConditionalGeneration, Qwen2Config

from prefixvlm.cli import main
from prefixvlm.inference.asking import generate_texts, user_messages
from prefixvlm.inference.llava import from_llava
from prefixvlm.inference.loading import load


def messages(number: int) -> list[dict]:
    pictures = [Image.effect_noise((30 + 9 * index, 20), 60).convert("RGB") for index in range(number)]
    return [*user_messages(pictures, "what?"), {"role": "assistant", "content": [{"type": "text", "text": "a box"}]}]


FAST = ("CLIP and Llama", "SigLIP and Qwen", "a tokenizer that adds its first token")


@pytest.fixture(
    scope="module", params=[kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def pair(request, tmp_path_factory):
    """A LLaVA with its processor, and what `prefixvlm import` made of its folder."""
    folder = tmp_path_factory.mktemp("llava")
    llava, processor = save_llava(folder, **KINDS[request.param])
    assert main(["import", str(folder), str(folder / "ours")]) == 0
    saved = json.loads((folder / "ours" / "config.json").read_text())
    assert saved["dtype"] == str(llava.dtype).removeprefix("torch.")
    # in float32, since a CPU may compute bfloat16 in another order
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return llava, processor, *load(str(folder / "ours"))


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_prompts_pictures_and_logits_are_equal(pair, pictures):
    llava, processor, model, ours = pair
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    said = messages(pictures)
    theirs, found = (one.apply_chat_template(said, **how) for one in (processor, ours))
    for name in ("input_ids", "attention_mask", *(["pixel_values"] if pictures else [])):
        assert torch.equal(found[name], theirs[name]), name
    with torch.no_grad():
        expected, logits = llava(**theirs).logits, model(**found).logits
    assert torch.equal(logits, expected)
    assert logits.std() > 0.1


def test_texts_are_written_as_parts_are(pair):
    _, _, _, ours = pair
    said = messages(0)
    texts = [{**message, "content": message["content"][-1]["text"]} for message in said]
    assert ours.apply_chat_template(texts) == ours.apply_chat_template(said)
    assert "a box" in ours.apply_chat_template(texts)


def test_greedy_answers_are_equal(pair):
    llava, processor, model, ours = pair
    asked = messages(2)[:1]
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)  # of a tokenizer on transformers 4, which generation does not know
    settings = {"max_new_tokens": 8, "do_sample": False, "bad_words_ids": [[llava.config.image_token_id]]}
    expected = llava.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert generate_texts(model, ours, inputs, max_new_tokens=8) == [processor.decode(expected, skip_special_tokens=True)]
    assert set(model.generation_config.eos_token_id) == set(llava.generation_config.eos_token_id)


def test_it_is_causal_and_as_tied_as_it_was(pair):
    llava, _, model, _ = pair
    assert model.config.attention_mode == "causal"
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == (llava.get_output_embeddings().weight is llava.get_input_embeddings().weight)


def test_it_can_be_trained_with_the_prefix_mask(tmp_path):
    save_llava(tmp_path / "llava", **KINDS["SigLIP and Qwen"])
    assert main(["import", str(tmp_path / "llava"), str(tmp_path / "start")]) == 0
    Image.effect_noise((16, 16), 80).convert("RGB").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": f"what {i}?", "answer": f"it is {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"data": {"source": "vqa", "path": str(tmp_path / "rows.jsonl")}, "max_steps": 1, "batch_size": 2}
    recipe = {"model": {"start": str(tmp_path / "start")}, "stages": {3: stage}, "output": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert load(str(tmp_path / "out" / "stage-3"))[0].config.attention_mode == "prefix"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"strategy": "full"}, "whose tokens are not the patches alone"),
        ({"layer": [-1, -2]}, "reads one layer"),
    ],
)
def test_features_that_cannot_be_read_are_refused(tmp_path, changes, sentence, capsys):
    kind = KINDS["CLIP and Llama"]
    save_llava(tmp_path / "llava", **kind)
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    names = {"strategy": "vision_feature_select_strategy", "layer": "vision_feature_layer"}
    config |= {names[name]: value for name, value in changes.items()}
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    assert main(["import", str(tmp_path / "llava"), str(tmp_path / "ours")]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "ours").exists()


def test_another_model_is_refused(tmp_path, capsys):
    Qwen2Config(**TEXT).save_pretrained(tmp_path)
    assert main(["import", str(tmp_path), str(tmp_path / "ours")]) == 2
    assert "is a qwen2; only a llava" in capsys.readouterr().err.splitlines()[-1]
    assert main(["import", str(tmp_path / "gone"), str(tmp_path / "ours")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_is_there_is_kept(tmp_path, capsys):
    save_llava(tmp_path, **KINDS["SigLIP and Qwen"])
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    assert main(["import", str(tmp_path), str(tmp_path / "ours")]) == 2
    assert "is there already" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["notes.txt"]


def test_a_processor_of_another_model_is_refused(tmp_path):
    save_llava(tmp_path, **KINDS["CLIP and Llama"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_index": 7, "image_token_id": 7}))
    with pytest.raises(ValueError, match="do not belong together"):
        from_llava(str(tmp_path))
