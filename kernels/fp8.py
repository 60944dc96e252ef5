"""Rows to float8 numbers with one scale a row: one pass. Card: docs/ops/fp8.md.

N rows, D channels. A program owns BLOCK_N whole rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

OLDEST_GPU = (8, 9)
# Of float8_e4m3fn; and the smallest scale, of which one over it is finite.
_LARGEST = tl.constexpr(448.0)
_SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["rows"])
def _quantize_fwd_kernel(
    x,  # [N, D]
    stride_x,
    rows,
    q,  # [N, D]
    scale,  # [N]
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < rows
    m = m_n[:, None] & (o_d < D)[None, :]
    b_x = tl.load(x + o_n[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    # The maximum passes over NaN, but the number itself stays NaN, and with it every product of its row.
    b_amax = tl.maximum(tl.max(tl.abs(b_x), 1), _LARGEST * _SMALLEST_SCALE)
    # Rounded as PyTorch rounds: the plain division of a GPU is an approximation.
    b_scale = tl.div_rn(b_amax, tl.full([BLOCK_N], _LARGEST, tl.float32))
    b_q = b_x * tl.div_rn(tl.full([BLOCK_N], 1.0, tl.float32), b_scale)[:, None]
    tl.store(q + o_n[:, None] * D + o_d[None, :], b_q.to(q.dtype.element_ty), mask=m)
    tl.store(scale + o_n, b_scale, mask=m_n)


def _candidates(channels: int) -> list[launch.Config]:
    # As in layer_norm: a program reads its rows once and whole; 4096 numbers give each thread of four warps 32.
    block = triton.next_power_of_2(channels)
    sizes = ((4096, 4), (2048, 4), (8192, 8))
    return [{"BLOCK_N": max(1, n // block), "BLOCK_D": block, "num_warps": w, "num_stages": 1} for n, w in sizes]


def quantize_fwd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed ``x / scale [N, D]`` in ``dtype``, and the scales ``[N, 1]`` float32, of ``x [N, D]``.

    ``dtype`` is float8_e4m3fn; in tests float32, still to be rounded, since Triton's interpreter rounds wrongly.

    Raises:
        NotImplementedError: the GPU has no instruction that rounds to float8.
    """
    if launch.capability(x) < OLDEST_GPU:
        got = "{}.{}".format(*launch.capability(x))
        raise NotImplementedError(f"float8 needs compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}, got {got}")
    x = launch.unit_stride(x)
    rows, channels = x.shape
    q = x.new_empty(rows, channels, dtype=dtype)
    scale = x.new_empty(rows, 1, dtype=torch.float32)
    launch.run(
        _quantize_fwd_kernel,
        lambda config: (triton.cdiv(rows, config["BLOCK_N"]),),
        *(x, x.stride(0), rows, q, scale),
        candidates=_candidates(channels),
        D=channels,
    )
    return q, scale
