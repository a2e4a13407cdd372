"""Answers to many questions about images by real generation, in batches of similar length.

Shapes: B batch, T tokens.
"""

import re
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from prefixvlm.train.conversation import Conversation


@torch.inference_mode()
def answer(model, processor, questions: list[Conversation], batch_size: int = 256, max_new_tokens: int = 8) -> list[str]:
    """Greedy answers, in the order of `questions` (conversations that end with a user turn).

    Args:
        model: a PrefixVLM; it is put into evaluation mode.
        processor: its processor.
        batch_size: questions generated for at once.
        max_new_tokens: where an answer is cut.
    """
    model.eval()
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].turns[-1][1]))
    answers = [""] * len(questions)
    for start in tqdm(range(0, len(order), batch_size), desc="Answering", unit="batch"):
        chosen = order[start : start + batch_size]
        inputs = processor.apply_chat_template(
            [questions[index].messages() for index in chosen],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers


def vqa_accuracy(model, processor, samples, **options) -> dict[str, float | int]:
    """Exact match of generated answers, apart for questions answered by yes or no and for open ones.

    Case, punctuation and spaces around words do not count.

    Args:
        samples: a sequence of `Conversation`s of one question and its answer each.
        options: those of `answer`.

    Returns:
        For `yes_no` and `open` the number of questions and, if there are any, the accuracy in [0, 1].
    """
    asked = [samples[index] for index in range(len(samples))]
    questions = [replace(sample, turns=sample.turns[:-1]) for sample in asked]
    hits = {"yes_no": [], "open": []}
    for sample, prediction in zip(asked, answer(model, processor, questions, **options), strict=True):
        reference = _normalized(sample.turns[-1][1])
        hits["yes_no" if reference in ("yes", "no") else "open"].append(_normalized(prediction) == reference)
    counts = {f"{kind}_questions": len(found) for kind, found in hits.items()}
    return {**counts, **{kind: sum(found) / len(found) for kind, found in hits.items() if found}}


def _normalized(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())
