"""One answer about one picture, as it is being written."""

from collections.abc import Iterator
from threading import Thread

from transformers import TextIteratorStreamer


def stream_answer(model, processor, image, question: str | None, max_new_tokens: int) -> Iterator[str]:
    """Yields the pieces of a greedy answer, or of a caption where there is no question.

    Args:
        image: anything `load_image` opens.

    Raises:
        ValueError: for an image that cannot be used.
    """
    if question:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        inputs = processor(images=image, text="", return_tensors="pt")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    errors = []

    def generate():
        try:
            model.eval().generate(
                **inputs.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=model.config.attention_mode != "bidirectional",  # a stage 0 model cannot use one
                streamer=streamer,
            )
        except Exception as error:  # whatever it is, the reader of the stream must not wait for ever
            errors.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if errors:
        raise errors[0]
