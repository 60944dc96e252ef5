"""The bottleneck adapter. Card: docs/ops/adapter.md."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.adapter import AdapterParams
from .checks import check_adapter, check_one_dtype, check_shape
from .dispatch import Impl, register, select
from .linear import linear


def adapter(x: Tensor, params: AdapterParams, residual: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """``residual + gelu(x W_d^T + b_d) W_u^T + b_u``, equations 2, 6 and 7; no sum where ``residual`` is None.

    Args:
        x: ``[..., D]``, any floating dtype.
        params: ``down_weight [r, D]``, ``down_bias [r]``, ``up_weight [D, r]``, ``up_bias [D]``.
        residual: ``[..., D]`` or None.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[..., D]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    check_adapter("params", params, x.shape[-1])
    if residual is not None:
        check_shape("residual", residual, *x.shape)
    check_one_dtype("adapter", x=x, **params._asdict())
    return select("adapter", impl, x, params, residual)(x, params, residual)


def down(x: Tensor, params: AdapterParams) -> Tensor:
    """``gelu(x W_d^T + b_d)``."""
    return F.gelu(linear(x, params.down_weight, params.down_bias))


def up(hidden: Tensor, params: AdapterParams) -> Tensor:
    """``h W_u^T + b_u``."""
    return linear(hidden, params.up_weight, params.up_bias)


def _torch(x: Tensor, params: AdapterParams, residual: Tensor | None = None) -> Tensor:
    y = up(down(x, params), params)
    return y if residual is None else residual + y


register("adapter", torch=_torch, reference=reference.adapter)
