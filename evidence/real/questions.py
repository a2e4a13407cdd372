"""Conversations about UC Merced's photographs, made of the captions' own words, for stage 3.

A conversation asks, in an order drawn for each photo:
- for a description: one of the photo's captions;
- which kind of place it is: one of the 21 classes, unless no caption of the photo names the class it is filed under;
- whether there is something that a caption of the photo names (yes), and something else that no caption of any photo of
  its class names (no), since a caption that is silent about a thing says little about the photo. Of the things that may be
  asked for, the one is taken that keeps yes and no balanced for every thing, so that no thing gives its answer away.
Only photos of the training split are read, for what is asked and for what a class is silent about.
"""

import random
import re
from collections import Counter, defaultdict

from evidence.data import DESCRIBE, llava_turns
from evidence.real.scenes import NAMES, is_named

WHICH = "Which kind of place is it?"
IS_THERE = "{} in the picture?"
YES, NO = "Yes", "No"
_THINGS = {
    "Are there airplanes": "airplanes?|planes?",
    "Are there boats": "boats?",
    "Are there bunkers": "bunkers?",
    "Are there cars": "cars?",
    "Are there houses": "houses?|villas?",
    "Are there mobile homes": "mobile homes?",
    "Are there storage tanks": "storage tanks?",
    "Are there tennis courts": "tennis courts?",
    "Are there waves": "waves",
    "Is there a baseball diamond": "baseball diamonds?",
    "Is there a forest": "forest",
    "Is there a parking lot": "parking lots?",
    "Is there a river": "river",
    "Is there a road": "roads?|freeways?|overpass|intersections?",
    "Is there a runway": "runways?",
    "Is there a swimming pool": "swimming pools?",
    "Is there farmland": "farmlands?|croplands?",
    "Is there sand": "sands?|beach",
}
THINGS = {question: re.compile(rf"\b({pattern})\b") for question, pattern in _THINGS.items()}
_DENIED = re.compile(r"\b(no|without)\b[^.]*")


def conversations(rows: list[dict]) -> list[dict]:
    """One conversation for each photo of the training split, in LLaVA's form; the same for the same rows."""
    rows = [row for row in rows if row["split"] == "train"]
    named_in_class = defaultdict(set)
    for row in rows:
        named_in_class[row["class_by_index"]] |= _things(row)
    surplus: Counter[str] = Counter()  # of yes over no, by thing
    made = []
    for row in rows:
        draw = random.Random(row["image"])
        turns = [(DESCRIBE, draw.choice(row["texts"]))]
        if any(is_named(row["class_by_index"], text) for text in row["texts"]):
            turns.append((WHICH, NAMES[row["class_by_index"]]))
        named, silent = _things(row), THINGS.keys() - named_in_class[row["class_by_index"]]
        if named and silent:
            there = min(sorted(named), key=lambda thing: surplus[thing])
            absent = max(sorted(silent), key=lambda thing: surplus[thing])
            surplus.update({there: 1, absent: -1})
            turns += [(IS_THERE.format(there), YES), (IS_THERE.format(absent), NO)]
        draw.shuffle(turns)
        made.append({"image": row["image"], "split": "train", "conversations": llava_turns(turns)})
    return made


def _things(row: dict) -> set[str]:
    """The questions of `THINGS` whose answer is yes by some caption of the row; "no cars" is not cars."""
    said = " ".join(_DENIED.sub("", text.lower()) for text in row["texts"])
    return {question for question, pattern in THINGS.items() if pattern.search(said)}
