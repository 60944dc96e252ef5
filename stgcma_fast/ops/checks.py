"""Argument checks shared by the operators. They read shapes and dtypes only: no work, no synchronization."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.adapter import AdapterParams


def check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise ValueError unless the shape is the expected one; a letter stands for any size."""
    sizes = zip(tensor.shape, expected, strict=False)
    if tensor.ndim != len(expected) or any(isinstance(e, int) and g != e for g, e in sizes):
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, expected))}], got {list(tensor.shape)}")


def check_alike(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device, floating, and of one dtype; autocast, if on, casts them itself."""
    present = {name: t for name, t in tensors.items() if t is not None}
    dtypes = {t.dtype for t in present.values()}
    devices = {t.device for t in present.values()}
    if len(devices) > 1:
        got = ", ".join(f"{name} {t.device}" for name, t in present.items())
        raise ValueError(f"{op}: expected one device, got {got}")
    device = next(iter(devices)).type
    if not all(dtype.is_floating_point for dtype in dtypes) or (len(dtypes) > 1 and not torch.is_autocast_enabled(device)):
        got = ", ".join(f"{name} {t.dtype}" for name, t in present.items())
        raise ValueError(f"{op}: expected one floating dtype (or autocast), got {got}")


def check_adapter(name: str, params: AdapterParams, channels: int) -> None:
    """Raise ValueError unless the weights fit together and take ``channels`` channels."""
    rank = params.down_weight.shape[0]
    check_shape(f"{name}.down_weight", params.down_weight, "r", channels)
    check_shape(f"{name}.down_bias", params.down_bias, rank)
    check_shape(f"{name}.up_weight", params.up_weight, channels, rank)
    check_shape(f"{name}.up_bias", params.up_bias, channels)


def check_choice(name: str, got: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``got`` is one of ``allowed``."""
    if got not in allowed:
        raise ValueError(f"{name}: got {got!r}, allowed are {', '.join(map(repr, allowed))}")
