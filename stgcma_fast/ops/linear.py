"""Matrix products with the weights of a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _image(rows: Tensor) -> Tensor:
    # Rows [N, D] as a channels-last image of N x 1 pixels, without a copy: a 1 x 1 convolution of it is the matrix product.
    return rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    rows = image.permute(0, 2, 3, 1)
    # No view in autograd's books, so that the result may be written to, as that of any other product.
    return torch.ops.aten._unsafe_view(rows, [rows.shape[:3].numel(), rows.shape[3]])


def _conv_gradients(grad: Tensor, x: Tensor | None, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple:
    # Where only the input's gradient is wanted the input itself is not read, but its layout decides that of the result.
    x = grad.new_empty(len(grad), weight.shape[1]) if x is None else x
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        _image(grad), _image(x), weight[:, :, None, None], [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
    )
    return _rows(grad_x) if wanted[0] else None, grad_weight.flatten(1) if wanted[1] else None, grad_bias


class _OneDnnLinear(torch.autograd.Function):
    """``x [N, D] @ weight.T + bias`` by oneDNN's convolutions; keeps ``x`` only where the weight is trained."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _rows(F.conv2d(_image(x), weight[:, :, None, None], bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _conv_gradients(grad.contiguous(), *ctx.saved_tensors, ctx.needs_input_grad)


class _FusedBiasLinear(torch.autograd.Function):
    """``x [N, D] @ weight.T + bias`` in bfloat16, the bias added as oneDNN writes the product; weights get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.contiguous(), "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as `torch.nn.functional.linear`.

    PyTorch sends float32 products on the CPU to MKL. oneDNN, which it uses for convolutions, is twice as fast on the AMD
    processor measured (two Zen 5 cores: 390 against 190 GFLOP/s). bfloat16 it sends to oneDNN, but writes the bias into every
    row first and reads it back; with frozen weights that is left out. Double backward is left to the other route: float64, or
    any dtype but these.

    Args:
        x: ``[..., D]``.
        weight: ``[O, D]``.
        bias: ``[O]`` or None.

    Returns:
        ``[..., O]``.
    """
    if _takes_bias(x, weight, bias):
        return _FusedBiasLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    if not served_by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight``: the gradient `linear` gives its input. ``[..., O]`` and ``[O, D]`` to ``[..., D]``."""
    if not served_by_onednn(grad, weight):
        return grad @ weight
    rows = grad.reshape(-1, grad.shape[-1])
    return _conv_gradients(rows, None, weight, (True, False, False))[0].view(*grad.shape[:-1], -1)


def _takes_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        bias is not None
        and torch.backends.mkldnn.enabled
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype == torch.bfloat16
        and not (weight.requires_grad or bias.requires_grad)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and not torch.compiler.is_compiling()
    )


def served_by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` sends this product to oneDNN."""
    return (
        _HAS_ONEDNN
        and torch.backends.mkldnn.enabled
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
