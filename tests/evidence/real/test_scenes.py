"""A caption names the class of its photograph, in the words that people use, and no other."""

import json
from pathlib import Path

import pytest

from evidence.real.scenes import NAMES, is_named

UCM = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "ucm_captions" / "captions.jsonl"


@pytest.mark.parametrize("scene", NAMES)
def test_its_own_name_names_a_class(scene):
    caption = "There is an airplane ." if scene == "airplane" else f"This is a {NAMES[scene]} ."
    named = [other for other in NAMES if is_named(other, caption)]
    assert named == [scene]


def test_parts_of_words_are_no_names():
    assert not is_named("river", "Several drivers park .")
    assert not is_named("denseresidential", "A medium residential area with houses .")


def test_people_name_the_class():
    if not UCM.is_file():
        pytest.skip(f"the captions of UCM are not at {UCM}")
    rows = [json.loads(line) for line in UCM.read_text(encoding="utf-8").splitlines()]
    for split in ("train", "val", "test"):
        named = [is_named(row["class_by_index"], text) for row in rows if row["split"] == split for text in row["texts"]]
        assert sum(named) > 0.97 * len(named), split
