"""Images encoded once and asked about many times: all questions share the KV cache of the prompt up to the last image.

Shapes: Q questions, L tokens of the shared prefix of the prompts, W tokens of the longest suffix.
"""

import copy

import torch

from prefixvlm.inference.asking import generate_texts, user_messages


class EncodedImages:
    """One or more images that a model has already read, ready for questions.

    Answers equal those of separate prompts: the prompt up to the last image is the same for every question, and in the
    modes that can use a cache it does not depend on what follows.

    ```python
    photo = EncodedImages(model, processor, "photo.png")
    photo.ask("what shape is present?")
    photo.ask(["what color is the shape?", "is there a circle?"])  # answered in one batch
    ```

    Args:
        model: a PrefixVLM; it is put into evaluation mode.
        processor: its processor.
        images: one image, or a list of images that all precede each question; anything `load_image` opens.

    Raises:
        ValueError: for an image that cannot be used, or a bidirectional (stage 0) model.
    """

    @torch.inference_mode()
    def __init__(self, model, processor, images):
        self.model, self.processor = model.eval(), processor
        self.images = list(images) if isinstance(images, list | tuple) else [images]
        text, ids = self._prompt("")
        last = text.rindex(processor.image_token) + len(processor.image_token)
        inputs = processor(images=self.images, text=text[:last], add_special_tokens=False, return_tensors="pt")
        self._prefix = inputs["input_ids"].to(model.device)  # (1, L)
        self._prefix_ids = ids[: _after_images(ids, processor.image_token_id)]
        self._cache = model(**inputs.to(model.device), use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def ask(self, questions: str | list[str], max_new_tokens: int = 128, **generation) -> str | list[str]:
        """Answers one question, or several as one batch.

        Args:
            generation: further arguments of `generate`, such as `num_beams`; decoding is greedy by default.

        Raises:
            ValueError: for an empty list, or for arguments that ask for more than one text per question.
        """
        if isinstance(questions, str):
            return self.ask([questions], max_new_tokens, **generation)[0]
        if not questions:
            raise ValueError("There are no questions to answer.")
        for name in ("num_return_sequences", "return_dict_in_generate", "generation_config"):
            if name in generation:
                raise ValueError(f"ask returns one text per question; leave out {name}, or call generate yourself.")
        generation = {"num_beams": 1, "max_new_tokens": max_new_tokens, **generation}
        suffixes = []
        for question in questions:
            _, ids = self._prompt(question)
            after = _after_images(ids, self.processor.image_token_id)
            if ids[:after] != self._prefix_ids:
                raise ValueError("The chat template puts questions before the images, so the prompts share no prefix.")
            suffixes.append(ids[after:])
        width, shared = max(map(len, suffixes)), self._prefix.shape[1]
        pad_token_id, device = self.processor.tokenizer.pad_token_id or 0, self.model.device
        # padding goes between the shared prefix and the suffix, so that all answers start at the same position
        padded = torch.tensor([[pad_token_id] * (width - len(suffix)) + suffix for suffix in suffixes], device=device)
        is_real = torch.tensor([[0] * (width - len(suffix)) + [1] * len(suffix) for suffix in suffixes], device=device)
        inputs = {
            "input_ids": torch.cat([self._prefix.expand(len(suffixes), -1), padded], dim=1),
            "attention_mask": torch.cat([is_real.new_ones(len(suffixes), shared), is_real], dim=1),
        }
        cache = self._copied(len(suffixes) * generation["num_beams"])
        return generate_texts(self.model, self.processor, inputs, past_key_values=cache, **generation)

    def _prompt(self, question: str) -> tuple[str, list[int]]:
        """The prompt as text and as ids, each image one token."""
        text = self.processor.apply_chat_template(user_messages(self.images, question), add_generation_prompt=True)
        return text, self.processor.text_ids(text)

    def _copied(self, rows: int):
        cache = copy.deepcopy(self._cache)  # generating appends to it
        cache.batch_repeat_interleave(rows)
        return cache


def _after_images(ids: list[int], image_token_id: int) -> int:
    """The position after the last image token."""
    return len(ids) - ids[::-1].index(image_token_id)
