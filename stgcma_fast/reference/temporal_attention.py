"""Attention over the time steps at each token position (equations 6 and 7)."""

from __future__ import annotations

from torch import Tensor


def temporal_attention(qkv: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """``softmax(scale q k^T + bias) v`` over T, for every site and head.

    Args:
        qkv: ``[B, T, S, 3, h, d]``: clips, time steps, token positions, (query, key, value), heads, head channels.
        bias: ``[h, T, T]``, trainable, or None.
        scale: factor of the scores, normally ``d ** -0.5``.

    Returns:
        ``[B, T, S, h * d]``.
    """
    query, key, value = qkv.permute(3, 0, 2, 4, 1, 5)  # [B, S, h, T, d] each
    scores = (query * scale) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ value).permute(0, 3, 1, 2, 4).flatten(-2)
