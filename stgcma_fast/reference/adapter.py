"""The bottleneck adapter (equation 2 without the exchange; the temporal adapter of equations 6 and 7)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class AdapterParams(NamedTuple):
    """The weights of one adapter: channels D, bottleneck r."""

    down_weight: Tensor  # [r, D]
    down_bias: Tensor  # [r]
    up_weight: Tensor  # [D, r]
    up_bias: Tensor  # [D]


def down(x: Tensor, params: AdapterParams) -> Tensor:
    """``gelu(x W_d^T + b_d)``: ``[..., D]`` to ``[..., r]``; exact (erf) GELU."""
    return F.gelu(F.linear(x, params.down_weight, params.down_bias))


def up(hidden: Tensor, params: AdapterParams) -> Tensor:
    """``h W_u^T + b_u``: ``[..., r]`` to ``[..., D]``."""
    return F.linear(hidden, params.up_weight, params.up_bias)


def adapter(x: Tensor, params: AdapterParams, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """``residual + scale * up(down(x))``, without the sum where ``residual`` is None and the product where ``scale`` is.

    Args:
        x: ``[..., D]``.
        params: the adapter's weights.
        residual: ``[..., D]`` or None.
        scale: ``[..., 1]``, broadcast to the tokens, or None; that of stochastic depth.
    """
    y = up(down(x, params), params)
    y = y if scale is None else y * scale
    return y if residual is None else residual + y
