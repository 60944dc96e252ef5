"""The windowed self-attention of Swin transformers, on the image layout."""

from __future__ import annotations

from torch import Tensor

from .windows import shift_mask, window_partition, window_reverse


def window_attention(qkv: Tensor, bias: Tensor, *, window: int, shift: int, scale: float, mask: Tensor | None = None) -> Tensor:
    """``softmax(scale q k^T + bias + mask) v`` inside each window of each frame.

    Args:
        qkv: ``[F, H, W, 3, h, d]``: frames, rows, columns, (query, key, value), heads, head channels.
        bias: ``[h, window**2, window**2]``, relative position bias.
        window: side of a window in tokens; H and W are multiples of it.
        shift: cyclic shift of the windows; with it tokens from opposite borders are masked by -100.
        scale: factor of the scores, normally ``d ** -0.5``.
        mask: ``[windows, window**2, window**2]``, what `shift_mask` returns, to save making it again; used if ``shift``.

    Returns:
        ``[F, H, W, h * d]``.
    """
    _, height, width, *_ = qkv.shape
    windows = window_partition(qkv, window, shift)  # [F, windows, window**2, 3, h, d]
    query, key, value = windows.permute(3, 0, 1, 4, 2, 5)  # [F, windows, h, window**2, d] each
    if shift:
        mask = shift_mask(height, width, window, shift) if mask is None else mask
        bias = bias + mask.to(bias)[:, None]
    scores = (query * scale) @ key.transpose(-1, -2) + bias
    out = (scores.softmax(-1) @ value).transpose(2, 3).flatten(-2)
    return window_reverse(out, height, width, window, shift)
