"""Attention over time at each token position. Card: docs/ops/temporal_attention.md."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .checks import check_one_dtype, check_shape
from .dispatch import Impl, register, select


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


# Scores are T x T, ten by ten: there is nothing to save by a fused attention, whose gradient to the bias PyTorch lacks.
register("temporal_attention", torch=reference.temporal_attention, reference=reference.temporal_attention)
