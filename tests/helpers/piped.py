"""Runs transformers' pipelines on a saved model in every way that people call them; run by test_pipelines.py."""

import json
import sys

import torch
import transformers
from PIL import Image

COLOURS = ("red", "green", "blue")
QUESTIONS = ("what?", "which colour is it?", "a?")
TOKENS = 4


def chat(image, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def texts(outputs) -> list[str]:
    """The generated texts of the outputs for several inputs, each with or without a list around it."""
    return [one[0]["generated_text"] if isinstance(one, list) else one["generated_text"] for one in outputs]


def main(folder: str, output: str) -> None:
    sys.modules["prefixvlm"] = None  # people have only transformers
    from transformers.pipelines.pt_utils import KeyDataset

    transformers.logging.set_verbosity_error()
    pictures = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]
    load = {"model": folder, "trust_remote_code": True, "dtype": torch.float32}
    pipe, captions = (transformers.pipeline(task, **load) for task in ("image-text-to-text", "image-to-text"))
    chats = [chat(*pair) for pair in zip(pictures, QUESTIONS, strict=True)]
    new = {"max_new_tokens": TOKENS, "return_full_text": False}
    found = {
        "chats": texts(pipe(text=chats, **new)),
        "one chat": texts([pipe(text=chats[0], **new)]),
        "chats in batches": texts(pipe(text=chats, batch_size=2, **new)),
        "chats of a generator": texts(pipe((one for one in chats), **new)),
        "chats of a data set": texts(pipe(KeyDataset([{"chat": one} for one in chats], "chat"), **new)),
        "images and texts": texts(pipe(images=pictures, text=list(QUESTIONS), **new)),
        "pairs of a generator": texts(
            pipe(({"images": image, "text": text} for image, text in zip(pictures, QUESTIONS, strict=True)), **new)
        ),
        "captions": texts(captions(pictures, max_new_tokens=TOKENS)),
        "one caption": texts([captions(pictures[0], max_new_tokens=TOKENS)]),
        "captions in batches": texts(captions(pictures, batch_size=2, max_new_tokens=TOKENS)),
        "captions of a generator": texts(captions((one for one in pictures), max_new_tokens=TOKENS)),
        "one question": texts(captions(pictures, prompt=QUESTIONS[0], max_new_tokens=TOKENS)),
        "chats for captions": texts(captions(text=chats, **new)),
    }
    captions.model.save_pretrained(output + ".saved")  # what transformers writes into the configuration stays out of it
    with open(output, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
