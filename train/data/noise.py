"""What replaces the noised words of stage 0 (Algorithm 1, line 3 of the paper, which does not name it).

Shapes: T tokens.
"""

import random

import torch

from prefixvlm.train.recipes.stages import NoiseToken

MASK_TOKEN = "<|mask|>"


class Noise:
    """Replaces a share of the words by noise; special, image and padding tokens never.

    Args:
        tokenizer: that of the model.
        share: of the words.
        token: `mask` is the tokenizer's mask token (`add_mask_token` gives it one), `pad` its padding token, `random` for
            each word another one of the vocabulary; `auto` is the mask token if there is one, else the padding token,
            else the end token.

    Raises:
        ValueError: if the tokenizer has no such token.
    """

    def __init__(self, tokenizer, share: float, token: NoiseToken = "auto"):
        self.share = share
        self.untouchable = torch.tensor(sorted(special_token_ids(tokenizer)))
        self.noise = torch.tensor(noise_token_ids(tokenizer, token) if share else [])

    def __call__(self, input_ids: torch.Tensor, source: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens (T,) with noise among them, and where it is (T,)."""
        if not self.share:
            return input_ids, torch.zeros_like(input_ids, dtype=torch.bool)
        generator = torch.Generator().manual_seed(source.getrandbits(63))
        chosen = torch.rand(input_ids.shape, generator=generator) < self.share
        chosen &= ~torch.isin(input_ids, self.untouchable)
        noise = self.noise[torch.randint(len(self.noise), input_ids.shape, generator=generator)]
        return torch.where(chosen, noise, input_ids), chosen


def special_token_ids(tokenizer) -> set[int]:
    """All ids that are control tokens rather than text."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def noise_token_ids(tokenizer, token: NoiseToken) -> list[int]:
    """The tokens that `Noise` draws from.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    if token == "random":
        words = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
        return sorted(words - special_token_ids(tokenizer))
    known = {"mask": tokenizer.mask_token_id, "pad": tokenizer.pad_token_id, "end": tokenizer.eos_token_id}
    found = [known[name] for name in (("mask", "pad", "end") if token == "auto" else (token,)) if known[name] is not None]
    if not found:
        names = "mask, padding or end" if token == "auto" else {"mask": "mask", "pad": "padding"}[token]
        raise ValueError(
            f"The tokenizer has no {names} token to serve as noise; set one (add_mask_token of prefixvlm.train.data adds a "
            "mask token to tokenizer and model), or choose the noise_token random."
        )
    return found[:1]


def add_mask_token(model, tokenizer) -> None:
    """Gives a tokenizer that has none a mask token, and the model an embedding for it where it has none to spare."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
