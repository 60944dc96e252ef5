"""The windowed self-attention of Swin transformers. Card: docs/ops/window_attention.md."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.windows import WindowGrid, shift_mask, window_partition, window_reverse
from .av_adapter import check_window_grid
from .checks import check_one_dtype, check_shape
from .dispatch import Impl, register, select


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    *,
    window: int,
    shift: int,
    scale: float,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``softmax(scale q k^T + bias + mask) v`` inside each window of each frame, on the image layout.

    Args:
        qkv: ``[F, H, W, 3, h, d]``, any floating dtype.
        bias: ``[h, window**2, window**2]``, relative position bias.
        window: side of a window in tokens; H and W are multiples of it.
        shift: cyclic shift of the windows; with it tokens from opposite borders are masked by -100.
        scale: factor of the scores, normally ``d ** -0.5``.
        mask: ``[windows, window**2, window**2]``, the mask of this shift where the caller has it at hand.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[F, H, W, h * d]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    check_shape("qkv", qkv, "F", "H", "W", 3, "h", "d")
    _, height, width, _, heads, _ = qkv.shape
    check_window_grid(WindowGrid(height, width, window, shift))
    check_shape("bias", bias, heads, window**2, window**2)
    if mask is not None:
        check_shape("mask", mask, (height // window) * (width // window), window**2, window**2)
    check_one_dtype("window_attention", qkv=qkv, bias=bias)
    options = {"window": window, "shift": shift, "scale": scale, "mask": mask}
    return select("window_attention", impl, qkv, bias, **options)(qkv, bias, **options)


def _torch(qkv: Tensor, bias: Tensor, *, window: int, shift: int, scale: float, mask: Tensor | None = None) -> Tensor:
    frames, height, width, *_ = qkv.shape
    windows = window_partition(qkv, window, shift)  # [F, windows, L, 3, h, d]
    query, key, value = windows.flatten(0, 1).permute(2, 0, 3, 1, 4)  # [F * windows, h, L, d] each
    bias = bias.to(query.dtype)
    if shift:
        mask = shift_mask(height, width, window, shift) if mask is None else mask
        bias = (bias + mask.to(bias)[:, None]).repeat(frames, 1, 1, 1)
    bias = bias.expand(*query.shape[:3], -1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return window_reverse(out.transpose(1, 2).flatten(2).unflatten(0, (frames, -1)), height, width, window, shift)


register("window_attention", torch=_torch, reference=reference.window_attention)
