"""Conversations to training batches: tensors, labels, and the noise of stage 0.

Shapes: B batch, T tokens, I images in the batch, C channels, H height, W width.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from prefixvlm.train.conversation import Conversation


class ConversationCollator:
    """Makes one batch, padded on the right, of `Conversation`s.

    Args:
        processor: a `PrefixVLMProcessor`.
        text_format: `caption` or `conversation`, as in `Stage`.
        noise: share of the input text tokens that become the noise token; special, image and padding tokens never do.
        augment: for pictures without an up and a right: mirror and turn them at random, and shuffle their questions.
        seed: of all that is random here.

    A batch holds `input_ids`, `attention_mask`, `labels` (B, T), `pixel_values` (I, C, H, W) and, with noise,
    `is_noised` (B, T), true where the input token was replaced.
    """

    def __init__(self, processor, text_format: str, noise: float = 0.0, augment: bool = False, seed: int = 0):
        self.processor = processor
        self.text_format = text_format
        self.noise = noise
        self.augment = augment
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.noise_token_id = noise_token_id(processor.tokenizer)
        self.untouchable_ids = torch.tensor(sorted(special_token_ids(processor.tokenizer)))

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        if self.augment:
            conversations = [replace(sample, turns=shuffled(sample.turns, self.random)) for sample in conversations]
        arguments = {"return_labels": True, "padding": True, "padding_side": "right", "return_tensors": "pt"}
        try:
            if self.text_format == "caption":
                texts = [self._caption(sample) for sample in conversations]
                batch = self.processor(images=[sample.images for sample in conversations], text=texts, **arguments)
            else:
                messages = [sample.messages() for sample in conversations]
                batch = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
        except ValueError as error:
            raise ValueError(f"In the batch from {conversations[0].name} to {conversations[-1].name}: {error}") from error
        batch = dict(batch)
        if self.augment and "pixel_values" in batch:
            batch["pixel_values"] = torch.stack([self._turned(image) for image in batch["pixel_values"]])
        if self.noise:
            batch["is_noised"] = self._noised(batch["input_ids"], batch["attention_mask"])
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["is_noised"], self.noise_token_id)
        return batch

    def _caption(self, sample: Conversation) -> str:
        images = self.processor.image_token * len(sample.images)
        return images + self.processor.as_typed(sample.caption) + self.processor.tokenizer.eos_token

    def _turned(self, image: torch.Tensor) -> torch.Tensor:
        """One of the eight ways to lay a square picture (C, H, W)."""
        if self.random.random() < 0.5:
            image = image.flip(-1)
        return image.rot90(self.random.randrange(4), dims=(-2, -1))

    def _noised(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        chosen = torch.rand(input_ids.shape, generator=self.generator) < self.noise
        return chosen & attention_mask.bool() & ~torch.isin(input_ids, self.untouchable_ids)


def shuffled(turns: list[tuple[str, str]], source: random.Random) -> list[tuple[str, str]]:
    """The turns with each question and its answer kept together, the pairs in random order."""
    pairs = [turns[start : start + 2] for start in range(0, len(turns), 2)]
    if any([role for role, _ in pair] != ["user", "assistant"] for pair in pairs):
        return turns
    source.shuffle(pairs)
    return [turn for pair in pairs for turn in pair]


def special_token_ids(tokenizer) -> set[int]:
    """All ids that are control tokens rather than text."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def noise_token_id(tokenizer) -> int:
    """The token that stands for a lost word in stage 0: the mask token if there is one, else padding.

    The paper does not name it (Algorithm 1, line 3). Either way its embedding says nothing about the caption.
    """
    for token_id in (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        "The tokenizer has no mask, padding or end token to serve as stage 0's noise; set tokenizer.pad_token."
    )
