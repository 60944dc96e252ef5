"""The full self-attention of a ViT frame (equations 8 and 9)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def spatial_attention(qkv: Tensor, *, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` over the tokens of each frame.

    Args:
        qkv: ``[F, S, 3, h, d]``: frames, tokens, (query, key, value), heads, head channels.
        scale: factor of the scores, normally ``d ** -0.5``.

    Returns:
        ``[F, S, h * d]``.
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [F, h, S, d] each
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(-2)
