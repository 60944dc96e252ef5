"""Layer normalization with frozen affine parameters. Card: docs/ops/layer_norm.md."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .checks import check_shape
from .dispatch import Impl, register, select


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
    return select("layer_norm", impl)(x, weight, bias, eps)


# PyTorch's own kernel keeps its statistics in float32 and skips the gradients of frozen parameters.
register("layer_norm", torch=reference.layer_norm, reference=reference.layer_norm)
