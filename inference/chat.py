"""A conversation that goes on: what a model has read of it, pictures above all, it does not read again.

Shapes: T tokens of the prompt so far.
"""

from collections.abc import Generator, Sequence

from transformers import DynamicCache

from prefixvlm.inference.asking import generate_texts, prompt_inputs, stream_text, user_messages


class Chat:
    """Questions and answers, with pictures in any turn. Answers equal those to the whole conversation asked anew.

    The KV cache goes on from turn to turn. It is made anew where it cannot: where the chat template writes earlier turns
    differently, and where a new picture changes what earlier tokens see (`prefix_all_images`). A bidirectional model has
    none.

    ```python
    chat = Chat(model, processor)
    print("".join(chat.ask("what shape is it?", ["photo.png"])))
    print("".join(chat.ask("and which color?")))
    ```

    Attributes:
        messages: of the conversation so far, as chat templates take them.

    Args:
        model: a PrefixVLM; it is put into evaluation mode.
        processor: its processor.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.messages: list[dict]
        self._cache: DynamicCache | None
        self._read: list[int]  # the tokens that are cached
        self.forget()

    def forget(self) -> None:
        """Begins a new conversation."""
        self.messages, self._cache, self._read = [], None, []

    def ask(
        self, question: str, images: Sequence = (), max_new_tokens: int = 128, **generation
    ) -> Generator[str, None, None]:
        """Yields the pieces of the answer to one more question. An answer that is left before its end stays as it is.

        Args:
            images: that come with the question; each anything that `load_image` opens.
            generation: further arguments of `generate`; decoding is greedy by default.

        Raises:
            ValueError: for an image that cannot be used; the conversation is then as it was before.
        """
        asked = [*self.messages, *user_messages(images, question)]
        inputs = prompt_inputs(self.processor, [asked])
        ids = inputs["input_ids"][0].tolist()
        if self.model.config.attention_mode != "bidirectional" and generation.get("num_beams", 1) == 1:
            generation["past_key_values"] = self._continued(ids, bool(images))
        said = ""
        pieces = self._pieces(inputs, max_new_tokens=max_new_tokens, **generation)
        try:
            for piece in pieces:
                said += piece
                yield piece
        except GeneratorExit:  # nobody wants more
            pieces.close()  # before the cache is touched, which generating appends to
            self._keep(asked, said, generation, ids)
            raise
        except BaseException:
            self._cache = None
            raise
        self._keep(asked, said, generation, ids)

    def _pieces(self, inputs, **generation) -> Generator[str, None, None]:
        if generation.get("num_beams", 1) > 1:  # which cannot be streamed
            yield from generate_texts(self.model, self.processor, inputs, **generation)
        else:
            yield from stream_text(self.model, self.processor, inputs, **generation)

    def _continued(self, ids: list[int], has_images: bool) -> DynamicCache:
        """The cache of what the prompt begins with, or an empty one."""
        is_changed = has_images and self.model.config.attention_mode == "prefix_all_images"
        if self._cache is None or is_changed or ids[: len(self._read)] != self._read:
            return DynamicCache(config=self.model.config.text_config)
        return self._cache

    def _keep(self, asked: list[dict], said: str, generation: dict, ids: list[int]) -> None:
        """Keeps what was said, and the prompt in the cache; the answer is read again, as the template writes it."""
        self.messages = [*asked, {"role": "assistant", "content": [{"type": "text", "text": said.strip()}]}]
        self._cache, self._read = generation.get("past_key_values"), ids
        if self._cache is not None and (surplus := self._cache.get_seq_length() - len(ids)):
            try:
                self._cache.crop(-surplus)
            except (ValueError, RuntimeError):  # a sliding window has moved on
                self._cache = None
