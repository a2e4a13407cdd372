"""Other models of transformers are scored by what they say themselves, asked with their own processor."""

import json

import pytest
import torch
from llavas import KINDS, save_llava
from PIL import Image
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from prefixvlm.cli import main
from prefixvlm.inference.asking import user_messages
from prefixvlm.inference.peers import is_peer

TOKENS = 6
QUESTIONS = ("what?", "which colour is it?", "a?", "is it red?")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return folder, *save_llava(folder, **KINDS["SigLIP and Qwen"])


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A model that captions pictures, and is asked nothing."""
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": len(words), "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text |= {"encoder_hidden_size": 32, "initializer_range": 0.5}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    processor = BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture
def rows(tmp_path):
    """Questions, with their captions and choices, about pictures of several sizes."""
    kept = []
    for number, question in enumerate(QUESTIONS):
        Image.effect_noise((20 + 7 * number, 16), 70).convert("RGB").save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "question": question, "answer": "yes" if number == 3 else "a box"}
        kept.append(
            row | {"texts": ["a box", "one box"], "choices": ["a box", "red", "nothing at all", "yes"], "split": "test"}
        )
    (tmp_path / "rows.json").write_text(json.dumps(kept))
    return tmp_path


def evaluate(folder, rows, task: str, *options: str) -> int:
    arguments = ["--data", str(rows / "rows.json"), "--output", str(rows / "out"), "--max-new-tokens", str(TOKENS)]
    return main(["evaluate", str(folder), "--task", task, *arguments, "--batch-size", "3", *options])


def predictions(rows) -> list[dict]:
    return [json.loads(line) for line in (rows / "out" / "predictions.jsonl").read_text().splitlines()]


def inputs_of(processor, rows, number: int, question: str, answer: str | None = None):
    messages = user_messages([Image.open(rows / f"{number}.png").convert("RGB")], question)
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    inputs = processor.apply_chat_template(
        [messages], add_generation_prompt=answer is None, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    return inputs


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_its_own_generate(llava, rows, beams):
    folder, model, processor = llava
    assert evaluate(folder, rows, "vqa", "--num-beams", str(beams)) == 0
    said = [row["prediction"] for row in predictions(rows)]
    expected = []
    for number, question in enumerate(QUESTIONS):
        inputs = inputs_of(processor, rows, number, question)
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, num_beams=beams)
        expected.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert said == expected
    assert len(set(said)) > 2
    metrics = json.loads((rows / "out" / "metrics.json").read_text())
    assert metrics["class"] == "LlavaForConditionalGeneration"


def test_choices_are_scored_by_its_own_likelihoods(llava, rows):
    folder, model, processor = llava
    assert evaluate(folder, rows, "choices") == 0
    for number, row in enumerate(predictions(rows)):
        asked = inputs_of(processor, rows, number, row["question"])["input_ids"].shape[1]
        for choice, found in zip(row["choices"], row["log_likelihoods"], strict=True):
            inputs = inputs_of(processor, rows, number, row["question"], choice)
            with torch.no_grad():
                scores = model(**inputs).logits[0].log_softmax(-1)
            ids = inputs["input_ids"][0]
            expected = sum(float(scores[place - 1, ids[place]]) for place in range(asked, len(ids)))
            assert found == pytest.approx(expected, rel=1e-4)


def test_captions_are_asked_for_in_words(llava, rows, capsys):
    folder, model, processor = llava
    assert evaluate(folder, rows, "captions") == 2
    assert "say by --prompt in which" in capsys.readouterr().err.splitlines()[-1]
    assert evaluate(folder, rows, "captions", "--prompt", "Describe it.") == 0
    inputs = inputs_of(processor, rows, 1, "Describe it.")
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert predictions(rows)[1]["prediction"] == expected


def test_a_model_that_only_captions(blip, rows, capsys):
    folder, model, processor = blip
    assert evaluate(folder, rows, "captions") == 0
    for number, row in enumerate(predictions(rows)):
        inputs = processor(images=Image.open(rows / f"{number}.png").convert("RGB"), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, num_beams=1)
        assert row["prediction"] == processor.decode(output[0], skip_special_tokens=True).strip()


def test_what_it_cannot_do_is_refused_by_name(blip, llava, rows, capsys):
    assert (
        main(["evaluate", str(blip[0]), "--task", "vqa", "--data", str(rows / "rows.json"), "--output", str(rows / "x")])
        == 2
    )
    assert "has no chat template" in capsys.readouterr().err.splitlines()[-1]
    assert evaluate(llava[0], rows, "vqa", "--int8") == 2
    assert "--int8 is for a PrefixVLM" in capsys.readouterr().err.splitlines()[-1]


def test_a_text_model_is_no_peer(tmp_path):
    from transformers import Qwen2Config

    Qwen2Config().save_pretrained(tmp_path)
    assert not is_peer(str(tmp_path))
