"""What makes a CPU fast: bfloat16 matrix products, and the decoding of one token.

The model enters here by `cpu_products` and `one_token`, the loss by `product_dtype` and the three products below it. On
other devices, and under torch.compile, none of this takes effect.

Products. A CPU without bfloat16 arithmetic multiplies bfloat16 matrices of many rows five to eight times faster if they are
converted to float32 first, which is also more accurate; float32 weights that autocast would round to bfloat16 stay float32.
A single row, as in decoding, is limited by memory bandwidth, and bfloat16 halves the bytes. A CPU with bfloat16 arithmetic
gets all its products from oneDNN, which reads the weights for a single row at two thirds of the speed of torch's own
kernels.

One token. Decoding is limited by reading the weights. transformers repeats keys and values for every query head and makes
a dozen small calls per layer; here the query heads that share keys form one attention call, and small operations are fused
where that changes results by rounding at most.

This file travels to the Hub with every checkpoint, so it imports only torch and transformers.

Shapes of products: R rows (all leading dimensions together), D and E width of input and output.
Shapes of one token: B batch, K keys (past and the new one), D width, H query heads, G key-value heads, E width of a head.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

MIN_ROWS = 4  # below, converting the weights takes longer than it saves
CHUNK_ELEMENTS = 2**20  # of a weight converted at once: 4 MiB, so that they are still in the cache when multiplied
MODEL_TYPES = ("llama", "qwen2")  # decoders whose layers are what `one_token` computes


def cpu_products(model: nn.Module, rows: torch.Tensor) -> AbstractContextManager:
    """The context in which layers of `model` are to be applied to `rows`, whose last dimension is their width."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    if torch.is_autocast_enabled("cpu"):
        autocast = torch.get_autocast_dtype("cpu")
        return nullcontext() if product_dtype(autocast, rows.device) == autocast else torch.autocast("cpu", enabled=False)
    if rows.dtype != torch.bfloat16:
        return nullcontext()
    count = rows.shape[:-1].numel()
    if count == 1:
        return OneRowProducts()
    if count < MIN_ROWS or _has_bfloat16_arithmetic():
        return nullcontext()
    # activations recomputed in the backward pass, outside this context, must be computed the same way in both passes
    recomputes = torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False)
        or type(module).__name__ == "CheckpointWrapper"  # torch's own, as for FSDP
        for module in model.modules()
    )
    return nullcontext() if recomputes else Float32Products()


def one_token(
    decoder: Any, inputs_embeds: torch.Tensor, attention_mask, position_ids, past_key_values, **further
) -> BaseModelOutputWithPast | None:
    """The decoder's output for one new token per row; `None` where only its own forward pass computes it.

    Args:
        decoder: any; the fast path is for those in `MODEL_TYPES`.
        inputs_embeds: (B, 1, D).
        attention_mask: (B, K), 0 at padding; `None` without padding.
        position_ids: (B, 1); by default the number of cached keys.
        past_key_values: the cache, to which the token's keys and values are added.
        further: other arguments of the decoder; any that asks for more than the last hidden state takes the plain path.
    """
    if inputs_embeds.shape[1] != 1 or not _can_step(decoder, inputs_embeds, attention_mask, past_key_values, further):
        return None
    hidden_states = _step(decoder, inputs_embeds, attention_mask, position_ids, past_key_values)
    return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute products of `dtype` in: float32 for bfloat16 on a CPU without arithmetic for it."""
    in_float32 = (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _has_bfloat16_arithmetic()
    )
    return torch.float32 if in_float32 else dtype


def _has_bfloat16_arithmetic() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class OneRowProducts:
    """A context in which torch multiplies with its own kernels instead of oneDNN's; no effect where oneDNN is off."""

    def __enter__(self):
        self.switches = bool(torch.backends.mkldnn.enabled)
        if self.switches:
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # torch types it as a descriptor

    def __exit__(self, *_):
        if self.switches:
            torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


class Float32Products(TorchFunctionMode):
    """A context in which linear layers and convolutions on many bfloat16 rows are computed in float32.

    Inputs, weights, outputs and the tensors saved for the backward pass stay bfloat16.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # as the modules call them: input, weight, bias
        if function in (functional.linear, functional.conv2d) and len(args) >= 3 and _is_large(*args[:2]):
            if function is functional.linear:
                return _Linear.apply(*args)
            tensors = [None if tensor is None else tensor.float() for tensor in args[:3]]
            return function(*tensors, *args[3:], **kwargs).to(args[0].dtype)
        return function(*args, **kwargs)


def _is_large(rows, weight) -> bool:
    is_plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    return is_plain and rows.dtype == weight.dtype == torch.bfloat16 and rows.numel() >= MIN_ROWS * rows.shape[-1]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias):
        ctx.save_for_backward(rows, weight)
        out = product(rows.flatten(0, -2), weight, bias)
        return out.to(rows.dtype, memory_format=torch.contiguous_format).unflatten(0, rows.shape[:-1])

    @staticmethod
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2).float()  # (R, E)
        return (
            gradient_of_rows(flat, weight).to(rows.dtype).view_as(rows) if needs_rows else None,
            gradient_of_weight(flat, rows.flatten(0, -2), weight.dtype) if needs_weight else None,
            flat.sum(dim=0).to(weight.dtype) if needs_bias else None,
        )


def product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows (R, D) times the transpose of a weight (E, D), plus a bias (E,), computed in `dtype`.

    Args:
        dtype: the weight's, or float32 for a bfloat16 weight, which is then converted chunk by chunk.

    Returns:
        (R, E) in `dtype`; not contiguous if the weight was converted.
    """
    if weight.dtype == dtype:
        return functional.linear(rows, weight, bias)
    columns = rows.float().T
    out = columns.new_empty(len(weight), len(rows))
    for chunk in _chunks(weight):
        torch.mm(weight[chunk].float(), columns, out=out[chunk])
    if bias is not None:
        out += bias[:, None]
    return out.T


def gradient_of_rows(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A gradient (R, E) times a weight (E, D): (R, D), computed in the gradient's dtype."""
    if gradient.dtype == weight.dtype:
        return gradient @ weight
    out = gradient.new_zeros(len(gradient), weight.shape[1])
    for chunk in _chunks(weight):
        out.addmm_(gradient[:, chunk], weight[chunk].float())
    return out


def gradient_of_weight(gradient: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The transpose of a gradient (R, E) times rows (R, D): (E, D) in `dtype`, computed in the gradient's dtype."""
    if gradient.dtype == rows.dtype == dtype:
        return gradient.T @ rows
    rows = rows.float()
    out = rows.new_empty(gradient.shape[1], rows.shape[1], dtype=dtype)
    for chunk in _chunks(out):
        out[chunk] = gradient[:, chunk].T @ rows
    return out


def _chunks(weight: torch.Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[1])
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def _can_step(decoder: Any, inputs_embeds: torch.Tensor, attention_mask, past_key_values, further: dict) -> bool:
    ignored = ("cache_position", "use_cache")
    wants_more = any(value is not None and value is not False for name, value in further.items() if name not in ignored)
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
        and past_key_values.get_seq_length() > 0
        and (attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.ndim == 2))
        and all(_is_as_built(module, decoder) for module in _modules_left_out(decoder))
    )


def _step(decoder: Any, inputs_embeds: torch.Tensor, attention_mask, position_ids, past_key_values) -> torch.Tensor:
    batch = len(inputs_embeds)
    if position_ids is None:
        position_ids = torch.full((1, 1), past_key_values.get_seq_length(), device=inputs_embeds.device)
    cos, sin = decoder.rotary_emb(inputs_embeds, position_ids)  # (B or 1, 1, E)
    half = cos.shape[-1] // 2
    # signs of rotate_half, whose halves are swapped by `roll` below
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


def _rms_norm(hidden_states: torch.Tensor, norm: Any) -> torch.Tensor:
    # a row concatenated with its negative has mean 0, so the fused layer norm of both is the RMS norm of the row
    both = torch.cat([hidden_states, -hidden_states], dim=-1)
    normed = nn.functional.layer_norm(both, both.shape[-1:], eps=norm.variance_epsilon)
    return normed[:, : hidden_states.shape[-1]] * norm.weight


def _modules_left_out(decoder: Any) -> Iterator[nn.Module]:
    """The modules whose submodules `_step` calls in place of the modules themselves."""
    yield decoder
    yield decoder.norm
    for layer in decoder.layers:
        yield from (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)


def _is_as_built(module: nn.Module, decoder: nn.Module) -> bool:
    """Whether a module's class is from the decoder's own file, so not an adapter, and the module has no hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in vars(module)
    return type(module).__module__ == type(decoder).__module__ and not hooks
