"""The pipeline behind `pipeline("image-to-text", ...)`, which transformers 4 has only for models that read no prompt.

This file travels to the Hub with every checkpoint, so it imports only transformers.
"""

from collections.abc import Iterable

from transformers import ImageTextToTextPipeline, Pipeline


class PrefixVLMPipeline(ImageTextToTextPipeline):
    """What `image-text-to-text` does, and captions of pictures that come alone."""

    def __call__(self, images=None, text=None, prompt: str | None = None, **kwargs):
        """Captions pictures, answers a question about each, or does what `image-text-to-text` does with the same arguments.

        Args:
            images: a picture (a path, an address or a PIL image), a list of them, or a generator or data set.
            text: as for `image-text-to-text`, with the chat template only for messages.
            prompt: a question to ask about each of `images`, by the chat template.
            kwargs: as for `image-text-to-text`.

        Returns:
            For each picture a list of one `{"generated_text": ...}`; without the outer list for a single picture.
        """
        if text is not None or not _are_pictures(images):
            return super().__call__(images, text, **kwargs)
        kwargs.setdefault("return_full_text", False)
        if prompt is None:
            asked = ({"images": image, "text": ""} for image in _as_list(images))
            said = Pipeline.__call__(self, asked if _is_lazy(images) else list(asked), **kwargs)
        else:
            said = super().__call__(text=[_messages(image, prompt) for image in _as_list(images)], **kwargs)
        if _is_lazy(images):
            return said
        return next(iter(said)) if _is_one(images) else list(said)


def _is_one(images) -> bool:
    return isinstance(images, str) or hasattr(images, "getbands")  # a PIL image


def _is_lazy(images) -> bool:
    return not _is_one(images) and not isinstance(images, list | tuple)


def _as_list(images) -> Iterable:
    return [images] if _is_one(images) else images


def _are_pictures(images) -> bool:
    """Whether these are pictures and not chats; what is lazy is taken for pictures."""
    if images is None:
        return False
    if isinstance(images, list | tuple):
        return bool(images) and all(map(_is_one, images))
    return not isinstance(images, dict)


def _messages(image, prompt: str) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]
