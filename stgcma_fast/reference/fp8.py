"""Linear layers of float8 numbers: what `precision="fp8-frozen"` computes in place of a frozen linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
# The smallest scale: one over it is finite, and rows of zeros have it.
SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 numbers and one scale a row, of which the product is near ``x``: a row's largest number becomes 448.

    ``scale = max(max |x|, 448 * 2**-126) / 448``, ``rows = round(x * (1 / scale))``. A row that is not finite has products that
    are not.

    Args:
        x: ``[N, D]``.

    Returns:
        ``[N, D]`` float8_e4m3fn, ``[N, 1]`` float32; float64 for float64.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(1, keepdim=True).clamp_min(LARGEST * SMALLEST_SCALE) / LARGEST
    return (wide * (1 / scale)).to(DTYPE), scale


def scaled_product(rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(row_scale rows) (weight_scale weight).T + bias`` in the dtype of the scales.

    Args:
        rows, row_scale: ``[N, D]`` and ``[N, 1]``, as `quantize_rows` gives them.
        weight, weight_scale: ``[O, D]`` and ``[O, 1]``, likewise.
        bias: ``[O]`` or None.

    Returns:
        ``[N, O]``.
    """
    # Autocast would round the factors once more.
    with torch.autocast(rows.device.type, enabled=False):
        y = (rows.to(row_scale.dtype) * row_scale) @ (weight.to(row_scale.dtype) * weight_scale).T
    return y if bias is None else y + bias


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return scaled_product(*quantize_rows(x), *quantize_rows(weight), bias).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return scaled_product(*quantize_rows(grad), *quantize_rows(weight.T)).to(grad.dtype), None, None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of float8 numbers, sums in float32. Weight and bias are frozen.

    ``x`` has a scale a row, ``weight`` one an output channel. The gradient of ``x`` is a product of float8 numbers too, of
    upstream gradients with a scale a row, and of the weight with a scale an input channel.

    Args:
        x: ``[N, D]``.
        weight: ``[O, D]``.
        bias: ``[O]`` or None.

    Returns:
        ``[N, O]``, dtype of ``x``.
    """
    return _Fp8Linear.apply(x, weight, bias)
