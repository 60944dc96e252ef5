"""The activation of the frozen FFN (equation 13)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, *, quick: bool) -> Tensor:
    """``x Phi(x)``, Phi being the normal distribution; or its approximation ``x sigmoid(1.702 x)``.

    Args:
        x: ``[..., D]``.
        quick: the approximation, which CLIP was trained with; Swin was with the exact function.
    """
    return x * torch.sigmoid(1.702 * x) if quick else F.gelu(x)
