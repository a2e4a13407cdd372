"""Whether the language head shares its weights with the embeddings: one truth for configuration, memory and checkpoint.

This file travels to the Hub with every checkpoint, so it imports only torch and its sibling.
"""

import torch
from torch import nn

from ..configuration.configuration_prefix_vlm import HUB_KWARGS


def refuse_to_drop_head(name: str, wanted: bool | None, is_tied: bool) -> None:
    """Raises a ValueError if the weights of embeddings and head are to be shared, but a checkpoint has both."""
    if wanted and not is_tied:
        raise ValueError(
            f"{name} has a language head of its own, which tie_word_embeddings=True would drop; leave that setting out."
        )


def is_tied_checkpoint(config_class, name: str, kwargs: dict) -> bool:
    """Whether a checkpoint shares the weights of embeddings and head; `True` if it has no configuration to say so.

    Args:
        kwargs: of `from_pretrained`.
    """
    try:
        stored, _ = config_class.get_config_dict(name, **{key: kwargs[key] for key in HUB_KWARGS if key in kwargs})
    except OSError:
        return True
    return config_class.from_dict(stored).tie_word_embeddings


def is_tied(model) -> bool | None:
    """Whether a model in memory shares the weights of embeddings and head; `None` where wrappers hide it."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # sharded weights are objects of their own
    is_plain = type(head) is nn.Linear and type(embeddings) is nn.Embedding and not hasattr(head.weight, "full_tensor")
    return head.weight is embeddings.weight if is_plain else None


def fill_head(model, missing_keys) -> None:
    """Copies the embeddings into the head if it is among the missing keys of a checkpoint, and takes it off them."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name in [name for name in missing_keys if name.endswith(".weight")]:
        if model.get_submodule(name.removesuffix(".weight")) is head and head.weight is not embeddings.weight:
            with torch.no_grad():
                head.weight.copy_(embeddings.weight)
            missing_keys.remove(name)


def tied_weights_keys(part, prefix: str) -> dict | list | None:
    """A part's `_tied_weights_keys` below its name in the whole: names on transformers 4, a dictionary on 5."""
    keys = part._tied_weights_keys
    if isinstance(keys, dict):
        return {prefix + target: prefix + source for target, source in keys.items()}
    return keys and [prefix + name for name in keys]
