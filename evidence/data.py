"""The small data sets of the studies in one format: small pictures with texts about them.

Of the given data folder, `ucm_captions/`, `coco_photos/`, `human_vs_machine_text/` and `vqa_rad/` are read; easy-VQA comes
from PyPI.
"""

import json
import random
from pathlib import Path

from PIL import Image

from prefixvlm.train.data import easy_vqa

SIZE = 48  # pixels a side: 36 patches, so that five seeds of every arm fit into an hour
DESCRIBE, WHAT = "Describe the image.", "What does it show?"
TWO_IMAGE_QUESTIONS = 12_000
PLACES = ("first", "second", "third")
TALKS = {"train": 6_000, "test": 600}  # conversations about three pictures
PART = "which part of the body is shown?"
EVERY_FIFTH = 5  # radiograph is for testing


def lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prepare_ucm(source: Path, folder: Path) -> None:
    """Prepares UCM captions with small pictures: as captions, and as conversations that ask for a caption and the class."""
    rows = lines(source / "captions.jsonl")
    for row in rows:
        row["image"] = _small(source / row["image"], folder)
    write_lines(folder / "captions.jsonl", rows)
    draw = random.Random(0)
    talks = []
    for row in rows:
        turns = [(DESCRIBE, draw.choice(row["texts"])), (WHAT, row["class_by_index"])]
        talks.append({"image": row["image"], "split": row["split"], "conversations": llava_turns(turns)})
    write_lines(folder / "conversations.jsonl", talks)


def prepare_easy_vqa(folder: Path) -> None:
    """Prepares easy-VQA as captions, as conversations, as single questions about one of two pictures, and as conversations
    about three."""
    for split in ("train", "test"):
        for name, samples in (("captions", easy_vqa.captions(split)), ("conversations", easy_vqa.conversations(split))):
            rows = []
            for sample in samples:
                row = {"image": _small(Path(sample.images[0]), folder, split), "split": split}
                if name == "captions":
                    row["texts"] = [sample.caption]
                else:
                    said = [text for _, text in sample.said]
                    row["conversations"] = llava_turns(list(zip(said[::2], said[1::2], strict=True)))
                rows.append(row)
            write_lines(folder / f"{name}-{split}.jsonl", rows)
        write_lines(folder / f"pairs-{split}.jsonl", _pairs(split))
        write_lines(folder / f"talks-{split}.jsonl", _talks(_easy_pictures(split), split))


def _easy_pictures(split: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The names of the prepared pictures, with their questions and answers."""
    return [(f"{split}-{image.stem}.png", questions) for image, questions in easy_vqa.questions_by_image(split).items()]


def _pairs(split: str) -> list[dict]:
    """Questions about the first or the second of two pictures."""
    draw = random.Random(f"pairs {split}")
    pictures = _easy_pictures(split)
    rows = []
    for _ in range(TWO_IMAGE_QUESTIONS if split == "train" else TWO_IMAGE_QUESTIONS // 6):
        both = draw.sample(pictures, 2)
        place = draw.randrange(2)
        question, answer = draw.choice(both[place][1])
        asked = f"{('first', 'second')[place]}: {question}"
        rows.append({"images": [name for name, _ in both], "split": split, "question": asked, "answer": answer})
    return rows


def prepare_radiographs(source: Path, folder: Path) -> None:
    """Prepares VQA-RAD's pictures as captions that name the part of the body, and for conversations about three of them.

    Its published split tests pictures that it also trains; here a picture is for one of the two.
    """
    asked: dict[str, list[tuple[str, str]]] = {}
    parts: dict[str, str] = {}
    for row in lines(source / "qa.jsonl"):
        parts[row["image"]] = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}[row["organ"]]
        if row["answer_type"] == "CLOSED" and row["answer"].lower() in ("yes", "no"):
            asked.setdefault(row["image"], []).append((row["question"], row["answer"].lower()))
    for split in ("train", "test"):
        chosen = [image for place, image in enumerate(sorted(parts)) if (place % EVERY_FIFTH == 0) == (split == "test")]
        pictures = []
        captions = []
        for image in chosen:
            name = _small(source / image, folder, split)
            # the part of the body as often as all else together
            closed = asked.get(image, [])
            pictures.append((name, [(PART, parts[image])] * max(1, len(closed)) + closed))
            captions.append({"image": name, "texts": [f"a picture of the {parts[image]}"], "split": split})
        write_lines(folder / f"captions-{split}.jsonl", captions)
        write_lines(folder / f"talks-{split}.jsonl", _talks(pictures, split))


def _talks(pictures: list[tuple[str, list[tuple[str, str]]]], split: str) -> list[dict]:
    """Conversations about three pictures: two among the words of the first turn, the third in the second turn.

    Each question is about one picture by its number, any of those that have been shown.
    """
    draw = random.Random(f"talks {split}")
    rows = []
    for _ in range(TALKS[split]):
        shown = draw.sample(pictures, len(PLACES))
        messages = []
        for new in (PLACES[:2], PLACES[2:]):
            content = []
            for place in new:
                content += [_text(f"{place}:"), {"type": "image", "image": shown[PLACES.index(place)][0]}]
            place = draw.choice(PLACES[: PLACES.index(new[-1]) + 1])
            question, reply = draw.choice(shown[PLACES.index(place)][1])
            messages.append({"role": "user", "content": [*content, _text(f"{place}: {question}")]})
            messages.append({"role": "assistant", "content": reply})
        rows.append({"messages": messages, "split": split})
    return rows


def _text(words: str) -> dict:
    return {"type": "text", "text": words}


def prepare_coco(source: Path, folder: Path) -> None:
    """Prepares the COCO photos, each with five human and five machine captions."""
    rows = lines(source / "captions.jsonl")
    for row in rows:
        row["image"] = _small(source / row["image"], folder)
        row["human"] = row.pop("texts")[:5]
        row["machine"] = [text for _, text in sorted(row.pop("machine_texts").items())][: len(row["human"])]
    write_lines(folder / "captions.jsonl", rows)


def prepare_texts(source: Path, folder: Path) -> None:
    """Prepares human and machine texts side by side; of COCO, odd rows train a decoder and even ones test it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"human": row["human"], "machine": [text for text in row["machine"].values() if text]}
        for row in lines(source / "coco_captions_paired.jsonl")
    ]
    write_lines(folder / "coco-train.jsonl", rows[1::2])
    write_lines(folder / "coco.jsonl", rows[::2])
    for path in source.glob("*_gpt-*.jsonl"):
        write_lines(folder / path.name, [{"human": row["human"], "machine": row["ai"]} for row in lines(path)])


def neutral_texts() -> list[str]:
    """Prose that is neither a caption nor machine-written and comes with every Python: its language reference."""
    from pydoc_data.topics import topics

    return [line for text in topics.values() for line in text.split("\n\n") if len(line) > 80]


def _small(image: Path, folder: Path, prefix: str = "") -> str:
    """Saves a picture in the size the encoders take; returns its name."""
    name = f"{prefix}-{image.stem}.png" if prefix else f"{image.stem}.png"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(image).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / name)
    return name


def asked_and_said(row: dict) -> list[tuple[str, str]]:
    """The (question, reply) pairs of a prepared conversation."""
    turns = [turn["value"] for turn in row["conversations"]]
    return list(zip(turns[::2], turns[1::2], strict=True))


def llava_turns(turns: list[tuple[str, str]]) -> list[dict]:
    """(question, reply) pairs in LLaVA's form."""
    return [{"from": role, "value": text} for pair in turns for role, text in zip(("human", "gpt"), pair, strict=True)]


def write_lines(path: Path, rows: list[dict]) -> None:
    """Writes rows as a JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
