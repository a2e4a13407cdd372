"""One more token a row on a CPU, through a decoder of the Llama kind with a third of the calls that its own layers make.

While decoding, a CPU waits for weights; everything else should hide behind that. transformers repeats keys and values for
every head and hands each layer through a dozen small operations. Here the heads that share keys ask together, as the
queries of one attention call, and operations are merged where that changes rounding at most.

This file travels to the Hub with every checkpoint, so it imports only torch and transformers.

Shapes: B batch, K keys (past and the new one), D width, H query heads, G key-value heads, E width of a head.
"""

import torch
from torch import nn
from transformers import DynamicCache

MODEL_TYPES = ("llama", "qwen2")  # decoders whose layers are what `step` computes


def can_step(decoder: nn.Module, inputs_embeds: torch.Tensor, attention_mask, past_key_values, further: dict) -> bool:
    """Whether `step` gives what `decoder` would, for one new token a row after a past.

    Args:
        attention_mask: what the decoder would be given.
        further: its other arguments; what asks for more than the last hidden state is refused.
    """
    wants_more = any(value is not None and value is not False for value in further.values())
    return (
        inputs_embeds.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not wants_more
        and not decoder.training
        and decoder.config.model_type in MODEL_TYPES
        and not decoder.config.output_attentions
        and not decoder.config.output_hidden_states
        and "sliding_attention" not in (getattr(decoder.config, "layer_types", None) or ())
        and type(past_key_values) is DynamicCache
        and (attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.ndim == 2))
        and all(_is_as_built(module, decoder) for module in _modules_left_out(decoder))
    )


def step(decoder: nn.Module, inputs_embeds: torch.Tensor, attention_mask, position_ids, past_key_values) -> torch.Tensor:
    """The decoder's last hidden state of one new token a row, which is also added to the cache.

    Args:
        decoder: see `can_step`.
        inputs_embeds: (B, 1, D).
        attention_mask: (B, K), 0 at padding; `None` where nothing is padded.
        position_ids: (B, 1); by default the number of keys before.
        past_key_values: the cache.

    Returns:
        (B, 1, D).
    """
    batch = len(inputs_embeds)
    if position_ids is None:
        position_ids = torch.full((1, 1), past_key_values.get_seq_length(), device=inputs_embeds.device)
    cos, sin = decoder.rotary_emb(inputs_embeds, position_ids)  # (B or 1, 1, E)
    half = cos.shape[-1] // 2
    # with the halves exchanged, what is turned back has its sign here
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    mask = None
    if attention_mask is not None and not attention_mask.all():
        mask = attention_mask.bool()[:, None, None, :]
    hidden_states = inputs_embeds[:, 0]  # (B, D)
    for index, layer in enumerate(decoder.layers):
        attention, norm = layer.self_attn, layer.input_layernorm
        normed = _rms_norm(hidden_states, norm)
        query, key = attention.q_proj(normed), attention.k_proj(normed)
        heads, width = query.shape[-1] // attention.head_dim, key.shape[-1]
        both = torch.cat([query, key], dim=-1).view(batch, -1, attention.head_dim)  # (B, H + G, E)
        both = torch.addcmul(both * cos, both.roll(half, dims=-1), sin)
        value = attention.v_proj(normed).view(batch, -1, 1, attention.head_dim)
        key, value = past_key_values.update(both[:, heads:, None], value, index)  # (B, G, K, E)
        query = both[:, :heads].reshape(batch, width // attention.head_dim, -1, attention.head_dim)  # (B, G, H / G, E)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scaling)
        hidden_states = hidden_states + attention.o_proj(seen.reshape(batch, -1))
        normed = _rms_norm(hidden_states, layer.post_attention_layernorm)
        mlp = layer.mlp
        hidden_states = hidden_states + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return _rms_norm(hidden_states, decoder.norm)[:, None]


def _rms_norm(hidden_states: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    # rows beside their negatives have mean 0, so that the one fused operation for layer norms gives root mean squares
    both = torch.cat([hidden_states, -hidden_states], dim=-1)
    normed = nn.functional.layer_norm(both, both.shape[-1:], eps=norm.variance_epsilon)
    return normed[:, : hidden_states.shape[-1]] * norm.weight


def _modules_left_out(decoder: nn.Module):
    """What `step` reads the parts of without calling it."""
    yield decoder
    yield decoder.norm
    for layer in decoder.layers:
        yield from (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)


def _is_as_built(module: nn.Module, decoder: nn.Module) -> bool:
    """Of the decoder's own file, so no adapter around it, and without hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in vars(module)
    return type(module).__module__ == type(decoder).__module__ and not hooks
