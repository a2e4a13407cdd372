"""Where tokens stand: after what is cached, after padding, in a packed document, within the decoder's context.

This file travels to the Hub with every checkpoint, so it imports only torch.

Shapes: B batch, T tokens, K keys (past and present).
"""

import torch
from torch import nn


def cache_lengths(past_key_values, length: int, cache_position=None) -> tuple[int | torch.Tensor, int]:
    """The number of cached tokens, and of the keys that attention sees once `length` more are added.

    The first is a tensor for a static cache, whose length is on its device.
    """
    if past_key_values is None:
        return 0, length
    if not past_key_values.is_compileable:
        past = past_key_values.get_seq_length()
        return past, past + length  # it grows
    # in transformers 4 a static cache counts its non-zero keys, and padding may have zero keys
    past = past_key_values.get_seq_length() if cache_position is None else cache_position[0]
    get_capacity = getattr(past_key_values, "get_max_length", None) or past_key_values.get_max_cache_shape  # 5.x or 4.x
    return past, get_capacity(0)


def is_empty(past_key_values) -> bool:
    """Whether nothing is cached, as far as that is known without asking the device."""
    return past_key_values is None or (not past_key_values.is_compileable and past_key_values.get_seq_length() == 0)


def context(text_config) -> int | None:
    """The most tokens that a decoder reads; `None` if its configuration does not say."""
    limit = getattr(text_config, "max_position_embeddings", None)
    scaling = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    if limit and "original_max_position_embeddings" not in scaling:  # else the limit is that of the scaled positions
        limit = int(limit * (scaling.get("factor") or 1))
    return limit


def attention_window(text_config) -> int | None:
    """The sliding window of a decoder, in tokens; `None` if no layer has one."""
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    return window if layer_types is None or "sliding_attention" in layer_types else None


def positions(attention_mask, document_ids, length: int) -> torch.Tensor | None:
    """(B, T) positions that start at 0 after left padding and in each document; `None` where plain counting suffices."""
    if document_ids is not None:
        position = torch.arange(length, device=document_ids.device).expand_as(document_ids)
        is_start = nn.functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
        return position - torch.where(is_start, position, 0).cummax(dim=-1).values
    if attention_mask is None:
        return None
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]


def documents(
    length: int, position_ids: torch.Tensor | None = None, seq_idx=None, cu_seq_lens_q=None, **_
) -> torch.Tensor | None:
    """(B, T) the packed document of each position, as padding-free batches of transformers give it; `None` if they do not.

    Args:
        length: T.
        position_ids: (B, T), a new document starts where they do not rise.
        seq_idx: (B, T), the documents themselves.
        cu_seq_lens_q: (documents + 1,), where each starts in a single row, and the end.
    """
    if seq_idx is not None:
        return seq_idx
    if cu_seq_lens_q is not None:
        places = torch.arange(length, device=cu_seq_lens_q.device)
        return torch.bucketize(places, cu_seq_lens_q[1:], right=True)[None]
    if position_ids is None:
        return None
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    return nn.functional.pad(starts.long().cumsum(dim=-1), (1, 0))
