"""Who may attend to whom: the one rule behind every attention mask.

Shapes: B batch, T tokens, Q query positions, K key positions, P image tokens.
"""

import torch


def image_index(is_image: torch.Tensor, num_image_tokens: int) -> torch.Tensor:
    """The number, from 1, of the image that each position belongs to; 0 for text.

    Images are separated by counting, since two images may be adjacent.

    Args:
        is_image: (B, T) bool.
        num_image_tokens: P, positions per image.
    """
    count = is_image.long().cumsum(dim=-1)
    return torch.where(is_image, (count - 1) // num_image_tokens + 1, 0)


def attention_mask_4d(
    valid: torch.Tensor,
    image_ids: torch.Tensor,
    mode: str,
    queries: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask of every mode, True where a query may attend to a key (arXiv 2503.19508, Fig. 3 and 6).

    With one image of two tokens before three words (rows are queries, columns are keys):

        causal      prefix      prefix_all_images   bidirectional
        x . . . .   x x . . .   as prefix; with a   x x x x x
        x x . . .   x x . . .   second image all    x x x x x
        x x x . .   x x x . .   rows see it too,    x x x x x
        x x x x .   x x x x .   even the earlier    x x x x x
        x x x x x   x x x x x   ones                x x x x x

    Padding is masked last, so no mode can unmask it. A padding query attends to itself too, which keeps its softmax
    finite; its output is never used.

    Args:
        valid: (B, K) bool, False at padding and at cache slots not filled yet.
        image_ids: (B, K), what `image_index` returns.
        mode: `causal`, `prefix`, `prefix_all_images` or `bidirectional`.
        queries: (Q,), the key positions of the queries; `None` for all.
        document_ids: (B, K), equal for the positions of one packed sample; `None` for one sample per row.

    Returns:
        (B, 1, Q, K) bool.
    """
    k = torch.arange(valid.shape[-1], device=valid.device)
    q = k if queries is None else queries
    itself = k == q[:, None]
    image_q, image_k = image_ids[:, q, None], image_ids[:, None, :]
    causal = k <= q[:, None]
    if mode == "causal":
        allowed = causal[None]
    elif mode == "prefix":
        allowed = causal | ((image_q == image_k) & (image_q > 0))
    elif mode == "prefix_all_images":
        allowed = causal | (image_k > 0)
    elif mode == "bidirectional":
        allowed = torch.ones_like(causal)[None]
    else:
        raise ValueError(f"There is no attention mode {mode!r}; choose causal, prefix, prefix_all_images or bidirectional.")
    if document_ids is not None:
        allowed = allowed & (document_ids[:, q, None] == document_ids[:, None, :])
    allowed = (allowed & valid[:, None, :]) | (itself & ~valid[:, q, None])
    return allowed[:, None]


def as_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same mask as numbers added to attention scores: 0 where allowed, the most negative number elsewhere.

    Eager attention needs this form; it would add a bool mask as 0 and 1.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
