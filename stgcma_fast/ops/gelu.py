"""The activation of the frozen FFN. Card: docs/ops/gelu.md."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .boundary import define
from .dispatch import Impl, register, select


def gelu(x: Tensor, *, quick: bool, impl: Impl = "auto") -> Tensor:
    """``x Phi(x)``, Phi being the normal distribution; or its approximation ``x sigmoid(1.702 x)``. Only x is kept.

    Args:
        x: ``[..., D]``, any floating dtype; autocast leaves it alone.
        quick: the approximation, which CLIP was trained with; Swin was with the exact function.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[..., D]``, dtype of ``x``.

    Raises:
        ValueError: no floating dtype.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    return select("gelu", impl, x, quick=quick)(x, quick=quick)


_fwd = define("gelu", "gelu_fwd(Tensor x, bool quick) -> Tensor", lambda x, quick: x.new_empty(x.shape))
_bwd = define("gelu", "gelu_bwd(Tensor grad, Tensor x, bool quick) -> Tensor", lambda grad, x, quick: x.new_empty(x.shape))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, quick: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.quick = quick
        return _fwd(x, quick)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _bwd(grad, x, ctx.quick), None


class _QuickGelu(torch.autograd.Function):
    """The reference's arithmetic without keeping the sigmoid."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # No mul_(x): torch.compile (2.11) would take the result for one that x has no part in, and give x a gradient of zero.
        return (1.702 * x).sigmoid_() * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # The derivative of t sigmoid(t) at t = 1.702 x, which PyTorch has as one kernel.
        return torch.ops.aten.silu_backward(grad, 1.702 * x)


def _triton(x: Tensor, *, quick: bool) -> Tensor:
    return _Gelu.apply(x, quick)


def _torch(x: Tensor, *, quick: bool) -> Tensor:
    return _QuickGelu.apply(x) if quick else reference.gelu(x, quick=False)


register("gelu", triton=_triton, torch=_torch, reference=reference.gelu)
