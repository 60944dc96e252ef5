"""Attention over time at each token position. Card: docs/ops/temporal_attention.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from .boundary import define
from .checks import check_one_dtype, check_shape
from .dispatch import Impl, Implementation, register, select

# A tile holds all channels of a head, and all frames of a site.
MAX_HEAD_DIM = 128
MAX_FRAMES = 64


def temporal_attention(qkv: Tensor, bias: Tensor | None, *, scale: float, impl: Impl = "auto") -> Tensor:
    """``softmax(scale q k^T + bias) v`` over T, for every site and head, equations 6 and 7.

    Args:
        qkv: ``[B, T, S, 3, h, d]``, any floating dtype and strides.
        bias: ``[h, T, T]``, trainable, or None.
        scale: factor of the scores, normally ``d ** -0.5``.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[B, T, S, h * d]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    check_shape("qkv", qkv, "B", "T", "S", 3, "h", "d")
    if bias is not None:
        check_shape("bias", bias, qkv.shape[4], qkv.shape[1], qkv.shape[1])
    check_one_dtype("temporal_attention", qkv=qkv, bias=bias)
    return select("temporal_attention", impl, qkv, bias, scale=scale)(qkv, bias, scale=scale)


_fwd = define(
    "temporal_attention",
    "temporal_attention_fwd(Tensor qkv, Tensor? bias, float scale) -> Tensor",
    lambda qkv, bias, scale: qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]),
)


def _bwd_fake(grad, qkv, bias, scale, qkv_grad, bias_grad):
    return [x.new_empty(x.shape) for x, wanted in ((qkv, qkv_grad), (bias, bias_grad)) if wanted]


_bwd = define(
    "temporal_attention",
    "temporal_attention_bwd(Tensor grad, Tensor qkv, Tensor? bias, float scale, bool qkv_grad, bool bias_grad) -> Tensor[]",
    _bwd_fake,
)


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, bias)
        ctx.scale = scale
        return _fwd(qkv, bias, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        found = iter(_bwd(grad, qkv, bias, ctx.scale, *wanted))
        return *(next(found) if w else None for w in wanted), None


def _limits(qkv: Tensor, bias: Tensor | None, *, scale: float) -> Iterator[str]:
    frames, head_dim = qkv.shape[1], qkv.shape[5]
    dtype = _product_dtype(qkv)
    if head_dim > MAX_HEAD_DIM:
        yield f"its kernels take heads of at most {MAX_HEAD_DIM} channels, got {head_dim}"
    # Exact float32 products of larger tiles do not fit the registers.
    most = (32 if head_dim <= 64 else 16) if dtype == torch.float32 else MAX_FRAMES
    if frames > most:
        yield f"its kernels take at most {most} frames of {head_dim} channels in {dtype}, got {frames}"


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _triton(qkv: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    # Under autocast as its products; the bias stays as it is and is added in float32.
    return _TemporalAttention.apply(qkv.to(_product_dtype(qkv)), bias, scale)


register(
    "temporal_attention",
    triton=Implementation(_triton, _limits),
    # Scores are T x T, ten by ten: without a kernel of its own there is nothing to save by PyTorch's fused attention, which
    # gives the bias no gradient.
    torch=reference.temporal_attention,
    reference=reference.temporal_attention,
)
