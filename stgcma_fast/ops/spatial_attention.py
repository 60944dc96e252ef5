"""The full self-attention of a ViT frame. Card: docs/ops/spatial_attention.md."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .checks import check_shape
from .dispatch import Impl, register, select


def spatial_attention(qkv: Tensor, *, scale: float, impl: Impl = "auto") -> Tensor:
    """``softmax(scale q k^T) v`` over the tokens of each frame, equations 8 and 9.

    Args:
        qkv: ``[F, S, 3, h, d]``, any floating dtype and strides.
        scale: factor of the scores, normally ``d ** -0.5``.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[F, S, h * d]``.

    Raises:
        ValueError: a shape that does not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    check_shape("qkv", qkv, "F", "S", 3, "h", "d")
    return select("spatial_attention", impl, qkv, scale=scale)(qkv, scale=scale)


# The reference is already PyTorch's fused attention on strided views of the packed tensor.
register("spatial_attention", torch=reference.spatial_attention, reference=reference.spatial_attention)
