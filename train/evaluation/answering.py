"""Generates answers to questions about images, and captions, in batches of similar length."""

from collections.abc import Iterable, Iterator

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from prefixvlm.inference.asking import caption_inputs, generate_texts, prompt_inputs
from prefixvlm.inference.environment import choose_device
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.recipes.evaluation import Decoding


def processes_and_device(name: str | None) -> tuple[PartialState, torch.device]:
    """The processes of this run, and the device of this one.

    Args:
        name: of the device, as for `choose_device`.

    Raises:
        ValueError: for one device by its number, where several processes need one each.
    """
    device = choose_device(name)
    processes = PartialState(cpu=device.type == "cpu")
    if processes.num_processes == 1:
        return processes, device
    if device.index is not None:
        raise ValueError(f"--device is {name}, but each of {processes.num_processes} processes needs its own.")
    return processes, processes.device


def answer(model, processor, questions: list[Conversation], show_progress: bool = True, **decoding) -> list[str]:
    """Answers, in the order of `questions`; see `answers`.

    Args:
        decoding: fields of `Decoding`.
    """
    texts = [""] * len(questions)
    for done in answers(model, processor, questions, range(len(questions)), Decoding(**decoding), show_progress):
        for index, text in done:
            texts[index] = text
    return texts


def answers(
    model, processor, questions, indices: Iterable[int], decoding: Decoding, show_progress: bool = True
) -> Iterator[list[tuple[int, str]]]:
    """Yields (index, text) pairs batch by batch, longest questions first, so that running out of memory shows at once.

    Args:
        model: a PrefixVLM; it is left in evaluation mode.
        processor: its processor.
        questions: conversations that end with a user turn; a single empty user turn asks for a caption.
        indices: of the questions to answer.

    Raises:
        ValueError: for an image that cannot be opened, naming its sample.
    """
    # captions are asked for without a chat template, so the two kinds cannot share a batch
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for index in sorted(indices, key=lambda index: _length(questions[index]), reverse=True):
        kinds[_is_caption(questions[index])].append(index)
    batches = [
        kind[start : start + decoding.batch_size]
        for kind in kinds.values()
        for start in range(0, len(kind), decoding.batch_size)
    ]
    for chosen in tqdm(batches, desc="Answering", unit="batch", disable=None if show_progress else True):
        inputs = _inputs(processor, [questions[index] for index in chosen])
        texts = generate_texts(
            model, processor, inputs, max_new_tokens=decoding.max_new_tokens, num_beams=decoding.num_beams
        )
        yield [(index, text.strip()) for index, text in zip(chosen, texts, strict=True)]


def _is_caption(question: Conversation) -> bool:
    return len(question.turns) == 1 and not question.turns[0].text


def _length(question: Conversation) -> tuple[int, int]:
    return len(question.images), sum(len(text) for _, text in question.said)


def _inputs(processor, questions: list[Conversation]):
    try:
        return prepared(processor, questions)
    except ValueError:
        for question in questions:
            try:
                prepared(processor, [question])
            except ValueError as error:
                raise ValueError(f"{question.name}: {error}") from error
        raise


def prepared(processor, questions: list[Conversation]):
    """A model's inputs for questions that are all captions, or all not.

    Raises:
        ValueError: for an image that cannot be opened.
    """
    if _is_caption(questions[0]):
        return caption_inputs(processor, [question.images for question in questions])
    return prompt_inputs(processor, [question.messages() for question in questions])
