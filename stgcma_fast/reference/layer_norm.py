"""Layer normalization over channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension.

    Args:
        x: ``[..., D]``.
        weight, bias: ``[D]``.
        eps: added to the (biased) variance.
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)
