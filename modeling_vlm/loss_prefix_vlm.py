"""The language head and its cross-entropy in one step, without ever holding all logits.

This file travels to the Hub with every checkpoint, so it imports only torch and its sibling.

Shapes: N supervised tokens, D width of the language model, V vocabulary.
"""

import torch
from torch import nn

from .cpu_prefix_vlm import gradient_of_rows, gradient_of_weight, product, product_dtype

CHUNK_ELEMENTS = 2**25  # logits held at once; in float32 128 MiB


@torch.compiler.disable  # it would be recompiled for every number of tokens
def head_and_loss(head: nn.Linear, hidden_states: torch.Tensor, targets: torch.Tensor, items):
    """Cross-entropy of `head(hidden_states)` against `targets` (paper, Eq. 1), summed in float32 and divided by `items`.

    The gradient is computed along with the loss, chunk by chunk, so neither logits nor their gradient are kept for the
    backward pass and nothing is computed twice. `backward` can be called only once. float16 is not chunked.

    Args:
        head: the language head; see `is_plain`.
        hidden_states: (N, D).
        targets: (N,), token ids.
        items: what the sum is divided by, a number or a scalar tensor.

    Returns:
        The loss, a scalar, and the detached losses of the tokens (N,), not divided.
    """
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = product_dtype(torch.get_autocast_dtype(hidden_states.device.type), hidden_states.device)
    if dtype == torch.float16:  # rounded before a loss scaler has multiplied it, the gradient would underflow
        losses = nn.functional.cross_entropy(head(hidden_states).float(), targets, reduction="none")
        return losses.sum() / items, losses.detach()
    with torch.autocast(hidden_states.device.type, enabled=False):
        return _HeadAndLoss.apply(hidden_states, head.weight, head.bias, targets, items, dtype, torch.is_grad_enabled())


def is_plain(head: nn.Module) -> bool:
    """Whether the head is its weight and nothing more: no adapter, no quantisation, no hook that fetches a weight."""
    has_hooks = head._forward_pre_hooks or head._forward_hooks or hasattr(head, "_hf_hook")
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not has_hooks


class _HeadAndLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, items, dtype, with_gradient):
        # autograd's flags do not depend on whether gradients are enabled
        needs_hidden, needs_weight, needs_bias = (with_gradient and needs for needs in ctx.needs_input_grad[:3])
        given = hidden_states, weight, bias
        computed_in = product_dtype(weight.dtype, weight.device)
        if computed_in == weight.dtype:
            computed_in = dtype
            weight, hidden_states = weight.to(dtype), hidden_states.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        losses = hidden_states.new_empty(len(targets), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = grad_bias = None
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            hidden = hidden_states[chunk]
            logits = product(hidden, weight, bias, computed_in).float()
            target = targets[chunk, None]
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            losses[chunk] = (log_normalizer - logits.gather(-1, target)).squeeze(-1)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # softmax less one at the target, in the memory of the logits
            gradient = logits.sub_(log_normalizer).exp_()
            gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -1.0)).div_(items)
            if needs_bias:
                grad_bias = _sum(grad_bias, gradient.sum(dim=0))
            gradient = gradient.to(computed_in)
            if grad_hidden is not None:
                grad_hidden[chunk] = gradient_of_rows(gradient, weight)
            if needs_weight:
                grad_weight = _sum(grad_weight, gradient_of_weight(gradient, hidden, weight.dtype))
        if needs_weight and grad_weight is None:  # no tokens
            grad_weight = torch.zeros_like(weight)
        if needs_bias and grad_bias is None:
            grad_bias = torch.zeros_like(bias)
        gradients = (grad_hidden, grad_weight, grad_bias)
        pairs = zip(gradients, given, strict=True)
        ctx.save_for_backward(*(None if gradient is None else gradient.to(tensor.dtype) for gradient, tensor in pairs))
        ctx.mark_non_differentiable(losses)
        return losses.sum() / items, losses

    @staticmethod
    def backward(ctx, grad_loss, _):
        # in place: a copy of the weight's gradient would raise the peak of memory
        gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in ctx.saved_tensors]
        return *gradients, None, None, None, None


def _sum(total: torch.Tensor | None, chunk: torch.Tensor) -> torch.Tensor:
    """Accumulates the chunks in float32, as one matrix product would; a single chunk keeps its dtype."""
    return chunk if total is None else total.float().add_(chunk)
