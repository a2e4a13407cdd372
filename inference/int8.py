"""A decoder with 8-bit weights: generation on a CPU is limited by memory bandwidth, and they halve the bytes of bfloat16.

Symmetric, one scale per row of a weight (absolute maximum over 127), no calibration; multiplied by torch's own packed
product, so nothing has to be compiled or installed.

Shapes: R rows (all leading dimensions together), D and E width of input and output.
"""

import torch
from torch import nn
from torch.nn import functional

from prefixvlm.modeling_vlm.cpu_prefix_vlm import product_dtype

MAX_PACKED_ROWS = 8  # with more, converting the weights back pays
PACKED_WIDTH = 16  # torch reads beyond the end of other widths where the CPU has AVX-512, and may crash


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights (E, D) and scales (E,).

    Args:
        linear: the layer it replaces.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        # rounded first, so that the integers compensate for it
        scales = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-30).to(torch.bfloat16)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (weight.float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (..., D) to (..., E)."""
        flat = rows if rows.ndim == 2 else rows.flatten(0, -2)
        if flat.device.type == "cpu" and len(flat) <= MAX_PACKED_ROWS and self.in_features % PACKED_WIDTH == 0:
            # torch's packed product is fast for bfloat16 rows only
            scales = self.scales.to(torch.bfloat16)  # as they were, if somebody has changed the model's dtype
            out = torch._weight_int8pack_mm(flat.to(torch.bfloat16), self.weight, scales).to(rows.dtype)
        else:
            # 8-bit integers are exact in bfloat16; float16 would overflow before they are scaled
            dtype = product_dtype(rows.dtype, rows.device) if rows.dtype == torch.bfloat16 else torch.float32
            out = functional.linear(flat.to(dtype), self.weight.to(dtype))
            out = (out * self.scales.to(dtype)).to(rows.dtype)
        if self.bias is not None:
            out += self.bias
        return out if rows.ndim == 2 else out.unflatten(0, rows.shape[:-1])

    def _save_to_state_dict(self, *args, **kwargs):
        raise ValueError("An int8 model cannot be saved; save the model that it was made from.")


@torch.no_grad()
def quantize_int8(model):
    """Replaces every linear layer of the decoder and its head by `Int8Linear`, in place; for generation only.

    The embedding stays as it is: only one row of it is read per token. A quantised model cannot be saved.

    Returns:
        The model.

    Raises:
        ValueError: for a model with adapters.
    """
    decoder = model.language_model
    if any(name.endswith("base_layer") for name, _ in decoder.named_modules()):
        raise ValueError("The decoder has adapters; merge them into its weights before they become 8-bit integers.")
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.Linear:
            parent = decoder.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Int8Linear(module))
    return model.eval()
