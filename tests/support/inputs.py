"""Seeded inputs: every tensor from a generator of its own, in the memory layouts that callers really pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("packed", "transposed", "slice", "expanded", "offset")
NAN = float("nan")


class Device:
    """Where `draw` puts its tensors; the fixture `kernels` changes it."""

    name = "cpu"


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_low_dtype = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
# Triton's interpreter truncates where a GPU rounds to bfloat16.
each_kernel_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=dtype_id
)
each_stride = pytest.mark.parametrize("strides", STRIDES)


def strided(x: Tensor, strides: str) -> Tensor:
    """The values of ``x`` in another memory layout; "expanded" repeats the first entry of the batch with stride 0.

    Memory around the tensor is NaN, so that reading past it shows.
    """
    if strides == "packed":
        return x.contiguous()
    if strides == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if strides == "slice":
        around = x.new_full((*x.shape[:-1], 3), NAN)
        return torch.cat([around, x, around], -1)[..., 3:-3]
    if strides == "expanded":
        return x[:1].contiguous().expand_as(x)
    if strides == "offset":
        return torch.cat([x.new_full((1,), NAN), x.flatten()])[1:].view(x.shape)
    raise ValueError(f"strides: got {strides!r}, allowed are {', '.join(STRIDES)}")


def draw(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0, strides: str = "packed"
) -> Tensor:
    """Normal numbers, drawn in float64 on the CPU and rounded to ``dtype``: but for rounding the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(math.prod(shape), dtype=torch.float64, generator=generator).view(shape)
    return strided((x * scale + shift).to(Device.name, dtype), strides)


def adapter_weights(
    seed: int, channels: int, rank: int, prefix: str = "", *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The four tensors of `AdapterParams` by name, at scales that keep hidden tokens and outputs near 1."""
    return {
        f"{prefix}down_weight": draw(seed, rank, channels, dtype=dtype, scale=channels**-0.5),
        f"{prefix}down_bias": draw(seed + 1, rank, dtype=dtype, scale=0.3),
        f"{prefix}up_weight": draw(seed + 2, channels, rank, dtype=dtype, scale=rank**-0.5),
        f"{prefix}up_bias": draw(seed + 3, channels, dtype=dtype, scale=0.3),
    }
