"""Layer normalization with frozen affine parameters. Card: docs/ops/layer_norm.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import reference
from .boundary import define
from .checks import check_shape
from .dispatch import Impl, Implementation, product_dtype, register, select

# A program holds whole rows in registers.
LARGEST_ROW = 8192


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, impl: Impl = "auto") -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, statistics in float32.

    Args:
        x: ``[..., D]``, any floating dtype.
        weight, bias: ``[D]``; their gradients are computed only where they are trained.
        eps: added to the (biased) variance.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[..., D]``.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    check_shape("weight", weight, x.shape[-1])
    check_shape("bias", bias, x.shape[-1])
    return select("layer_norm", impl, x, weight, bias, eps)(x, weight, bias, eps)


def packed_layer_norm(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5, *, side: int | None = None, impl: Impl = "auto"
) -> Tensor:
    """`layer_norm` of one or two streams ``[..., D]``, for a linear layer: rows ``[rows, D]``, one stream behind the other.

    Under autocast the rows are in the autocast dtype, to which the linear layer would round them.

    Args:
        xs: ``[..., D]`` each; with ``side``, ``[..., side * side, C]``.
        weight, bias: ``[D]``; with ``side``, D = 4 C.
        eps: added to the (biased) variance.
        side: of a square grid of tokens, even. A row is then four neighbours, 2 x 2, as Swin merges them.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    return _packed(xs, weight, bias, eps, side, impl)[0]


def branched_layer_norm(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5, *, impl: Impl = "auto"
) -> tuple[Tensor, list[Tensor]]:
    """`packed_layer_norm`, and the streams once more, for the residual that goes past the branch.

    Where a kernel serves, it adds the residual's gradient to the branch's as it writes it; otherwise the streams are the
    same tensors.
    """
    return _packed(xs, weight, bias, eps, None, impl)


def _packed(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float, side: int | None, impl: Impl
) -> tuple[Tensor, list[Tensor]]:
    if len(xs) not in (1, 2) or len({x.dtype for x in xs}) > 1:
        raise ValueError(f"xs: expected one or two streams of one dtype, got {[x.dtype for x in xs]}")
    for x in xs:
        channels = x.shape[-1] if side is None else 4 * x.shape[-1]
        check_shape("weight", weight, channels)
        check_shape("bias", bias, channels)
        if side is not None and (side % 2 or x.shape[-2] != side**2):
            raise ValueError(f"side: expected an even number, and side * side tokens, got {side} and {list(x.shape)}")
    serving = select("layer_norm", impl, xs[0], weight, bias, eps)
    if serving is _triton:
        rows = [x.reshape(-1, x.shape[-1]) for x in xs]
        other = rows[1] if len(rows) > 1 else None
        y, *again = _LayerNorm.apply(weight, bias, eps, side or 0, product_dtype(xs[0]), rows[0], other)
        return y, [row.view(x.shape) for row, x in zip(again, xs, strict=False)]
    rows = [serving(x if side is None else _neighbours(x, side), weight, bias, eps).flatten(0, -2) for x in xs]
    return torch.cat(rows) if len(rows) > 1 else rows[0], list(xs)


def _neighbours(x: Tensor, side: int) -> Tensor:
    """``[..., side * side, C]`` to ``[..., side * side / 4, 4 C]``: 2 x 2 tokens in one, columns of the grid first."""
    grid = x.flatten(0, -3).unflatten(1, (side // 2, 2, side // 2, 2))
    return grid.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)


def _fwd_fake(xs, weight, bias, eps, side, dtype):
    rows = sum(x.shape[0] for x in xs) // (4 if side else 1)
    y = xs[0].new_empty(rows, weight.shape[0], dtype=dtype)
    return y, *(y.new_empty(rows, dtype=torch.float32) for _ in range(2))


_fwd = define(
    "layer_norm",
    "layer_norm_fwd(Tensor[] xs, Tensor weight, Tensor bias, float eps, int side, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = define(
    "layer_norm",
    "layer_norm_bwd(Tensor grad, Tensor[] xs, Tensor weight, Tensor mean, Tensor rstd, Tensor[] again, int side) -> Tensor[]",
    lambda grad, xs, weight, mean, rstd, again, side: [x.new_empty(x.shape) for x in xs],
)


class _LayerNorm(torch.autograd.Function):
    """The rows, then each stream as it is: its other use, whose gradient the kernel adds."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, bias: Tensor, eps: float, side: int, dtype: torch.dtype, x: Tensor, other: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # No `*xs`: in PyTorch 2.11 a compiled call without gradients leaves out the context if as many arguments are given as
        # a variadic forward has parameters.
        xs = [x] if other is None else [x, other]
        y, mean, rstd = _fwd(xs, weight, bias, eps, side, dtype)
        ctx.side = side
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, mean, rstd, *xs)
        return y, x.view_as(x), None if other is None else other.view_as(other)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor | None, *again: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, mean, rstd, *xs = ctx.saved_tensors
        again = again[: len(xs)]
        if grad is None:
            dxs = again
        else:
            residual = any(g is not None for g in again)
            added = [torch.zeros_like(x) if g is None else g for g, x in zip(again, xs, strict=True)] if residual else []
            dxs = _bwd(grad, xs, weight, mean, rstd, added, ctx.side)
        return None, None, None, None, None, dxs[0], dxs[1] if len(dxs) > 1 else None


def _limits(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Iterator[str]:
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
        yield "its kernel gives weight and bias no gradients, and they are trained"
    if len(weight) > LARGEST_ROW:
        yield f"its kernel takes rows of at most {LARGEST_ROW} channels, got {len(weight)}"


def _triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # Eager autocast normalizes in float32 and returns float32.
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    return _LayerNorm.apply(weight, bias, eps, 0, dtype, x.reshape(-1, x.shape[-1]), None)[0].view(x.shape)


register(
    "layer_norm",
    triton=Implementation(_triton, _limits),
    # PyTorch's own kernel keeps its statistics in float32 and skips the gradients of frozen parameters.
    torch=reference.layer_norm,
    reference=reference.layer_norm,
)
