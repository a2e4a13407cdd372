"""Asking a model: builds its inputs from prompts and generates text, all at once or streamed.

Shapes: B prompts, T tokens, I images.
"""

from collections.abc import Generator, Mapping, Sequence
from threading import Event, Thread

import torch
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


def user_messages(images: Sequence, question: str) -> list[dict]:
    """A one-turn conversation: a question about images, each given as anything `load_image` opens."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def prompt_inputs(processor, conversations: list[list[dict]]) -> BatchFeature:
    """A model's inputs for answering conversations that end with a user turn.

    Returns:
        `input_ids` and `attention_mask` (B, T), left-padded; `pixel_values` (I, C, H, W) if there are images.

    Raises:
        ValueError: for an image that cannot be used.
    """
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, **_tensors(conversations)
    )


def caption_inputs(processor, images: list[Sequence]) -> BatchFeature:
    """A model's inputs for captioning each prompt's images; captions are asked for without a chat template.

    Returns and raises the same as `prompt_inputs`.
    """
    return processor(images=images, text=[""] * len(images), **_tensors(images))


def generate_texts(model, processor, inputs: Mapping[str, torch.Tensor], **generation) -> list[str]:
    """Generates after each prompt and decodes the new tokens, without special tokens.

    Args:
        model: a PrefixVLM, or another model of transformers; it is left in evaluation mode.
        inputs: the model's inputs, left-padded.
        generation: further arguments of `generate`; decoding is greedy by default.
    """
    # a bidirectional (stage 0) model cannot use a cache; other models have no such mode
    has_cache = getattr(model.config, "attention_mode", None) != "bidirectional"
    defaults = {"do_sample": False, "use_cache": has_cache}
    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        output = model.eval().generate(**on_device, **{**defaults, **generation})
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return processor.batch_decode(output[:, start:], skip_special_tokens=True)


class Stopped(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], self.event.is_set(), device=input_ids.device)


def stream_text(model, processor, inputs: Mapping[str, torch.Tensor], **generation) -> Generator[str, None, None]:
    """Yields the text after a single prompt piece by piece as it is generated; arguments as for `generate_texts`.

    Generation ends with the iterator, also when that is closed, or left by an exception, before its end.
    """
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, errors = Event(), []
    criteria = StoppingCriteriaList([*(generation.pop("stopping_criteria", None) or []), Stopped(stop)])

    def generate() -> None:
        try:
            generate_texts(model, processor, inputs, streamer=streamer, stopping_criteria=criteria, **generation)
        except Exception as error:  # of any kind: the stream's reader must not wait forever
            errors.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stop.set()
        thread.join()  # left alone, it would abort an interpreter that goes away
    if errors:
        raise errors[0]


def stream_answer(
    model, processor, images: Sequence, question: str | None, max_new_tokens: int
) -> Generator[str, None, None]:
    """Yields the pieces of a greedy answer to a question about images, or of a caption if there is no question.

    Args:
        images: in the order in which the model sees them; each anything that `load_image` opens.

    Raises:
        ValueError: for an image that cannot be used.
    """
    if question:
        inputs = prompt_inputs(processor, [user_messages(images, question)])
    else:
        inputs = caption_inputs(processor, [images])
    yield from stream_text(model, processor, inputs, max_new_tokens=max_new_tokens)


def _tensors(prompts: Sequence) -> dict:
    """Arguments of the processor; a single prompt does not need a padding token."""
    padding = {"padding": True, "padding_side": "left"} if len(prompts) > 1 else {}
    return {"return_tensors": "pt", **padding}
