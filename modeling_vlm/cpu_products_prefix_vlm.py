"""bfloat16 products on CPUs, where torch's own choice is slow: many rows without bfloat16 arithmetic, and one row with it.

Without it torch multiplies bfloat16 matrices of many rows five to eight times slower than it converts them and multiplies
in float32, which is also nearer the truth. One row, as in decoding, is another matter: it is read at the speed of memory,
and bfloat16 is half as much to read. With it torch hands all products to oneDNN, which reads the weights of a single row at
two thirds of the speed of torch's own code.

This file travels to the Hub with every checkpoint, so it imports only torch.

Shapes: R rows (all leading dimensions together), D and E width of input and output.
"""

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MIN_ROWS = 4  # below, converting the weights takes longer than it saves
CHUNK_ELEMENTS = 2**20  # of a weight converted at once: 4 MiB, so that they are still in the cache when multiplied


def bf16_is_emulated(tensor: torch.Tensor) -> bool:
    """Whether products of this tensor's dtype are better computed in float32 on its device."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class OneRowProducts:
    """A context in which torch multiplies by itself, without oneDNN; of no effect where that is switched off already."""

    def __enter__(self):
        self.switches = torch.backends.mkldnn.enabled
        if self.switches:
            torch.backends.mkldnn.enabled = False

    def __exit__(self, *_):
        if self.switches:
            torch.backends.mkldnn.enabled = True


class Float32Products(TorchFunctionMode):
    """A context in which linear layers and convolutions of many bfloat16 rows are computed in float32.

    Inputs, weights and results stay bfloat16, and so does what is kept for the backward pass.
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


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Rows (R, D) times the transpose of a weight (E, D), plus a bias (E,), in float32: (R, E), not contiguous."""
    columns = rows.float().T
    out = columns.new_empty(len(weight), len(rows))
    for chunk in _chunks(weight):
        torch.mm(weight[chunk].float(), columns, out=out[chunk])
    if bias is not None:
        out += bias[:, None]
    return out.T


def gradient_of_rows(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A float32 gradient (R, E) times a weight (E, D): (R, D), float32."""
    out = gradient.new_zeros(len(gradient), weight.shape[1])
    for chunk in _chunks(weight):
        out.addmm_(gradient[:, chunk], weight[chunk].float())
    return out


def gradient_of_weight(gradient: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The transpose of a float32 gradient (R, E) times rows (R, D): (E, D) in `dtype`, computed in float32."""
    rows = rows.float()
    out = rows.new_empty(gradient.shape[1], rows.shape[1], dtype=dtype)
    for chunk in _chunks(out):
        out[chunk] = gradient[:, chunk].T @ rows
    return out


def _chunks(weight: torch.Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[1])
    return [slice(start, start + size) for start in range(0, len(weight), size)]
