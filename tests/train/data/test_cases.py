"""Small files that failed when they were tried, where they are at hand: what `prefixvlm inspect` now says of each."""

import json
from pathlib import Path

import pytest
from tiny import tiny_processor

from prefixvlm.cli import main
from prefixvlm.train.data import sources
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.screening import screen

CASES = Path(__file__).parents[4] / "shared" / "cases" / "data"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason=f"no folder {CASES}")

# the format, the rows that are used, and what is said of the others
EXPECTED = {
    "llava/backslash.json": ("llava", 1, None),
    "llava/base64.json": ("llava", 1, None),
    "llava/code_answer.json": ("llava", 1, None),
    "llava/empty_answer_first.json": ("llava", 1, None),
    "llava/fewer_placeholders.json": ("llava", 0, "1 <image>, but the row has 2"),
    "llava/image_empty_string.json": ("llava", 0, "`image` is empty"),
    "llava/image_in_answer.json": ("llava", 1, None),
    "llava/int_answer.json": ("llava", 1, None),
    "llava/more_placeholders.json": ("llava", 0, "2 <image>, but the row has 1"),
    "llava/placeholder_no_image.json": ("llava", 0, "1 <image>, but the row has no image"),
    "llava/second_turn.json": ("llava", 1, None),
    "llava/system_key.json": ("llava", 1, None),
    "llava/video.json": ("llava", 0, "names a video"),
    "llava/weight_loss.json": ("llava", 1, None),
    "messages/lf.json": ("messages", 1, None),
    "messages/openai.jsonl": ("messages", 1, None),
    "messages/parts.jsonl": ("messages", 1, None),
    "messages/trl.jsonl": ("messages", 1, None),
    "caps.csv": ("captions", 1, None),
    "captions_val2017.json": ("captions", 1, None),
    "cauldron.parquet": ("pairs", 1, None),
    "imagefolder": ("captions", 1, None),
    "wds/shard-000000.tar": ("captions", 2, None),
    "surrogate.jsonl": ("vqa", 1, "a broken character"),
    "badbyte.jsonl": ("vqa", 1, "not valid JSON"),
    "bom.jsonl": ("vqa", 2, None),
    "lines.json": ("vqa", 2, None),
    "wrapped.json": ("vqa", 1, None),
    "vision_tokens.json": ("llava", 1, None),
    "mix_text_only.json": ("llava", 8, None),
}


@needs_cases
@pytest.mark.parametrize("name", EXPECTED)
def test_a_case(name, capsys):
    form, used, why = EXPECTED[name]
    # these name their images from the folder above
    images = ["--images", str(CASES)] if name.startswith(("llava", "messages")) else []
    assert main(["inspect", str(CASES / name), *images, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["used"], found["reported"] > 0) == (form, used, why is not None)
    assert all(why in problem["why"] for problem in found["problems"])


@needs_cases
def test_an_empty_file_is_refused(capsys):
    assert main(["inspect", str(CASES / "empty.jsonl"), "--json"]) == 2
    assert "has no row that can be read" in capsys.readouterr().err


@needs_cases
def test_answers_survive_to_the_letter():
    answers = {
        "code_answer": "    indented\n\tline\n",
        "image_in_answer": "Use the <image> tag of SVG: <svg><image></image></svg>",
    }
    for name, answer in answers.items():
        sample = sources.load("auto", path=str(CASES / "llava" / f"{name}.json"))[0]
        assert sample.said[-1] == ("assistant", answer)


@needs_cases
def test_images_without_places_are_all_in_front_by_the_setting():
    for name, images in (("fewer_placeholders", 2), ("more_placeholders", 1)):
        path = str(CASES / "llava" / f"{name}.json")
        sample = sources.load("auto", path=path, images_without_place="front")[0]
        first = sample.turns[0]
        assert len(sample.images) == len(first.parts) - 1 == images
        assert first.text == "Compare."


@needs_cases
def test_the_rest_of_a_file_of_texts_is_trained_in_every_format():
    data = sources.load("auto", path=str(CASES / "mix_text_only.json"))
    for text_format in ("caption", "conversation"):
        assert len(screen(data, ConversationCollator(tiny_processor(), text_format)).indices) == len(data) == 8
