"""Cutting frames into shifted windows in one pass on the CPU, where rolling and cutting are two."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import windows


def _orders(frames: int, height: int, width: int, size: int, shift: int) -> tuple[Tensor, Tensor]:
    """Where each token of the windows lies in the image, and each token of the image in the windows."""
    tokens = torch.arange(frames * height * width, device="cpu")
    order = windows.window_partition(tokens.view(frames, height, width, 1), size, shift)
    back = windows.window_reverse(tokens.view_as(order), height, width, size, shift)
    return order.flatten(), back.flatten()


class _Reorder(torch.autograd.Function):
    """``x[order]``, whose gradient is ``grad[back]``."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.back), None, None


def _in_one_pass(x: Tensor, shift: int) -> bool:
    # Unshifted windows are views until they are copied, once. float64 keeps the form that can be differentiated twice.
    return shift > 0 and x.device.type == "cpu" and x.dtype != torch.float64 and not torch.compiler.is_compiling()


def window_partition(x: Tensor, size: int, shift: int) -> Tensor:
    """``[F, H, W, ...]`` to ``[F, H/size * W/size, size*size, ...]``."""
    if not _in_one_pass(x, shift):
        return windows.window_partition(x, size, shift)
    frames, height, width, *rest = x.shape
    rows = _Reorder.apply(x.flatten(0, 2), *_orders(frames, height, width, size, shift))
    return rows.view(frames, -1, size * size, *rest)


def window_reverse(x: Tensor, height: int, width: int, size: int, shift: int) -> Tensor:
    """The inverse of `window_partition`: ``[F, windows, size*size, ...]`` to ``[F, H, W, ...]``."""
    if not _in_one_pass(x, shift):
        return windows.window_reverse(x, height, width, size, shift)
    order, back = _orders(len(x), height, width, size, shift)
    return _Reorder.apply(x.flatten(0, 2), back, order).view(len(x), height, width, *x.shape[3:])
