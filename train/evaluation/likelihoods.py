"""How likely a model finds each of several answers to a question: multiple choice without generation.

Shapes: B rows, each a question with one of its answers; T tokens; K last positions, from the one that predicts the first
token of the longest answer; V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch

from prefixvlm.configuration.configuration_prefix_vlm import IGNORE_INDEX
from prefixvlm.train.data.conversation import Conversation, Turn


@torch.inference_mode()
def log_likelihoods(
    model, processor, questions: Sequence[Conversation], answers: Sequence[Sequence[str]], batch_size: int
) -> list[list[float]]:
    """The log-likelihood of each answer to each question, in nats.

    It is summed over the tokens that training would learn of that answer: its words and the token that closes it.

    Args:
        model: a PrefixVLM, or another model of transformers; it is left in evaluation mode.
        processor: its processor, which may say by `rows_to_score` how many rows it can prepare at once.
        questions: conversations that end with a user turn.
        answers: those of each question.
        batch_size: rows at once, of similar length.

    Raises:
        ValueError: for an image that cannot be opened, or an answer without words.
    """
    model.eval()
    batch_size = min(batch_size, getattr(processor, "rows_to_score", batch_size))
    rows = [(number, place) for number, given in enumerate(answers) for place in range(len(given))]
    rows.sort(key=lambda row: sum(len(text) for _, text in questions[row[0]].said) + len(answers[row[0]][row[1]]))
    found = [[0.0] * len(given) for given in answers]
    for begin in range(0, len(rows), batch_size):
        chosen = rows[begin : begin + batch_size]
        batch = [_answered(questions[number], answers[number][place]) for number, place in chosen]
        for (number, place), value in zip(chosen, _of_batch(model, processor, batch), strict=True):
            found[number][place] = value
    return found


def _answered(question: Conversation, answer: str) -> Conversation:
    """The question with an answer, the only one that counts."""
    if not answer.strip():
        raise ValueError(f"{question.name}: an answer to choose from has no words.")
    before = [replace(turn, is_supervised=False) for turn in question.turns]
    return replace(question, turns=[*before, Turn("assistant", (answer,))])


def _of_batch(model, processor, batch: list[Conversation]) -> list[float]:
    padding = {"padding": True, "padding_side": "left"} if len(batch) > 1 else {}
    inputs = processor.apply_chat_template(
        [one.messages() for one in batch],
        tokenize=True,
        return_dict=True,
        return_labels=True,
        return_tensors="pt",
        **padding,
    ).to(model.device)
    labels = inputs.pop("labels")  # (B, T)
    is_counted = labels != IGNORE_INDEX
    first = int(is_counted.any(dim=0).nonzero()[0])
    # (B, K, V), where K - 1 tokens are predicted; the last position predicts nothing
    kept = labels.shape[1] - first + 1
    limit = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(**inputs, use_cache=False, **limit).logits[:, -kept:]
    targets, is_counted = labels[:, first:], is_counted[:, first:]
    picked = logits[:, :-1].float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(~is_counted, 0.0).sum(dim=-1, dtype=torch.float64).tolist()
