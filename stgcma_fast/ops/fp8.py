"""Frozen linear layers of float8 numbers. Card: docs/ops/fp8.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.fp8 import DTYPE, quantize_rows
from .boundary import define
from .dispatch import Impl, product_dtype, refusals

# The oldest release whose product of float8 numbers with a scale a row was looked into.
OLDEST_TORCH = (2, 11)
OLDEST_GPU = (8, 9)
# Of both sizes of a weight: 16 bytes are what PyTorch's product reads at once. A program of the kernel holds whole rows.
MULTIPLE, LARGEST_SIZE = 16, 8192


class QuantizedWeight(NamedTuple):
    """A frozen weight ``[O, D]`` for both directions."""

    rows: Tensor  # [O, D]
    row_scale: Tensor  # [O, 1]
    columns: Tensor  # [D, O]
    column_scale: Tensor  # [D, 1]


@torch.no_grad()
def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """``[O, D]`` with a scale an output channel, and transposed with a scale an input channel."""
    return QuantizedWeight(*quantize_rows(weight), *quantize_rows(weight.T.contiguous()))


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, quantized: QuantizedWeight, *, impl: Impl = "auto") -> Tensor:
    """``x @ weight.T + bias`` of float8 numbers with a scale a row, by PyTorch's scaled product; likewise the gradient of x.

    Nothing of ``x`` is kept, and weight and bias are frozen.

    Args:
        x: ``[..., D]``; in bfloat16, or under autocast to it.
        weight: ``[O, D]``, any floating dtype; it is not read.
        bias: ``[O]`` or None.
        quantized: what `quantize_weight` makes of ``weight``.
        impl: what quantizes rows: "triton", the kernel; "torch", PyTorch's own operators; "auto", the kernel where Triton is.

    Returns:
        ``[..., O]`` bfloat16.

    Raises:
        NotImplementedError: float8 cannot serve; the text gives every reason.
    """
    without_kernel = refusals("fp8_linear", "triton")
    reasons = [*fp8_refusals(x.device), *_limits(x, weight, bias), *(without_kernel if impl == "triton" else ())]
    if reasons:
        raise NotImplementedError(f"precision='fp8-frozen' was asked for, but {'; '.join(reasons)}")
    bias = None if bias is None else bias.to(torch.bfloat16)
    kernel = impl != "torch" and not without_kernel
    return _Fp8Linear.apply(x.flatten(0, -2), bias, kernel, *quantized).view(*x.shape[:-1], -1)


def fp8_refusals(device: torch.device) -> Iterator[str]:
    """Every reason why this device cannot multiply float8 numbers with a scale a row."""
    if torch.__version__ < OLDEST_TORCH:
        yield f"it needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, got {torch.__version__}"
    if device.type != "cuda":
        yield f"it needs a CUDA device, got {device.type}"
    else:
        gpu = torch.cuda.get_device_properties(device)
        if (gpu.major, gpu.minor) < OLDEST_GPU:
            yield f"it needs compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}, got {gpu.major}.{gpu.minor}"


def size_refusals(weight: Tensor) -> Iterator[str]:
    """The reason why no device multiplies with this weight, if there is one."""
    if any(size % MULTIPLE or size > LARGEST_SIZE for size in weight.shape):
        yield f"it takes weights of sizes that are multiples of {MULTIPLE} up to {LARGEST_SIZE}, got {list(weight.shape)}"


def _limits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[str]:
    if product_dtype(x) != torch.bfloat16:
        yield f"it needs bfloat16, or autocast to it, got {product_dtype(x)}"
    yield from size_refusals(weight)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        yield "it gives weight and bias no gradients, and they are trained"


def _fwd_fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], 1, dtype=torch.float32)


_fwd = define("fp8", "quantize_fwd(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", _fwd_fake)


def _quantize(x: Tensor, kernel: bool) -> tuple[Tensor, Tensor]:
    return _fwd(x, DTYPE) if kernel else quantize_rows(x)


def _product(rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.fp8.scaled_product`, rounded to bfloat16."""
    # Without fast accumulation, which on Hopper would keep 14 bits of a sum.
    return torch._scaled_mm(rows, weight.t(), row_scale, weight_scale.t(), bias=bias, out_dtype=torch.bfloat16)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        bias: Tensor | None,
        kernel: bool,
        rows: Tensor,
        row_scale: Tensor,
        columns: Tensor,
        column_scale: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(columns, column_scale)
        ctx.kernel, ctx.dtype = kernel, x.dtype
        return _product(*_quantize(x, kernel), rows, row_scale, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _product(*_quantize(grad, ctx.kernel), *ctx.saved_tensors).to(ctx.dtype), *(None,) * 6
