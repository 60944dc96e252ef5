"""Matrix products with the weights of a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _conv_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A 1 x 1 convolution over a channels-last "image" of rows x 1 pixels: same product, same layout, nothing is copied.
    image = x.view(1, len(x), 1, -1).permute(0, 3, 1, 2)
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).view(len(x), -1)


class _OneDnnLinear(torch.autograd.Function):
    """``x [N, D] @ weight.T + bias`` by oneDNN; keeps ``x`` only where the weight is trained."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _conv_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            _conv_linear(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
            grad.t() @ x if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as `torch.nn.functional.linear`.

    PyTorch sends float32 products on the CPU to MKL, which uses half of an AVX-512 unit on processors that are not Intel's;
    oneDNN uses all of it (measured on a Zen 5 core: 190 against 390 GFLOP/s) and serves float32 convolutions. Double backward
    is left to the other route: float64, or any dtype but float32.

    Args:
        x: ``[..., D]``.
        weight: ``[O, D]``.
        bias: ``[O]`` or None.

    Returns:
        ``[..., O]``.
    """
    usual = (
        not _HAS_ONEDNN
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )
    if usual:
        return F.linear(x, weight, bias)
    return _OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
