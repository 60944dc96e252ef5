"""Layer normalization with frozen affine parameters, one or two streams in one launch. Card: docs/ops/layer_norm.md.

N rows of a stream, D channels. A program owns BLOCK_N rows of one stream; rows of the streams lie one behind the other in
the output and in the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def _fwd_tile(
    x,  # [N, D]
    stride_x,
    rows,
    weight,  # [D]
    bias,  # [D]
    y,  # [N, D]
    mean,  # [N]
    rstd,  # [N]
    eps,
    tile,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < rows, o_d < D
    m = m_n[:, None] & m_d[None, :]
    b_x = tl.load(x + o_n[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, 1) / D
    b_centred = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_rstd = 1 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / D + eps)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_b = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_centred * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(y + o_n[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)
    tl.store(mean + o_n, b_mean, mask=m_n)
    tl.store(rstd + o_n, b_rstd, mask=m_n)


@triton.jit(do_not_specialize=["rows0", "rows1"])
def _layer_norm_fwd_kernel(
    x0,  # [N0, D]
    x1,  # [N1, D]
    stride_x0,
    stride_x1,
    rows0,
    rows1,
    weight,  # [D]
    bias,  # [D]
    y0,  # [N0, D]
    y1,  # [N1, D]
    mean0,  # [N0]
    mean1,  # [N1]
    rstd0,  # [N0]
    rstd1,  # [N1]
    eps,
    D: tl.constexpr,
    STREAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, BLOCK_N)
    if STREAMS == 1 or tile < tiles0:
        _fwd_tile(x0, stride_x0, rows0, weight, bias, y0, mean0, rstd0, eps, tile, D, BLOCK_N, BLOCK_D)
    else:
        _fwd_tile(x1, stride_x1, rows1, weight, bias, y1, mean1, rstd1, eps, tile - tiles0, D, BLOCK_N, BLOCK_D)


@triton.jit
def _bwd_tile(
    grad,  # [N, D]
    stride_g,
    x,  # [N, D]
    stride_x,
    rows,
    weight,  # [D]
    mean,  # [N]
    rstd,  # [N]
    dx,  # [N, D]
    tile,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < rows, o_d < D
    m = m_n[:, None] & m_d[None, :]
    b_g = tl.load(grad + o_n[:, None] * stride_g + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_x = tl.load(x + o_n[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_mean = tl.load(mean + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(rstd + o_n, mask=m_n, other=0.0)
    # Masked channels have a gradient of zero, so they do not count in either mean.
    b_wg = b_g * tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_xhat = (b_x - b_mean[:, None]) * b_rstd[:, None]
    b_dx = b_wg - (tl.sum(b_wg, 1) / D)[:, None] - b_xhat * (tl.sum(b_wg * b_xhat, 1) / D)[:, None]
    tl.store(dx + o_n[:, None] * D + o_d[None, :], (b_dx * b_rstd[:, None]).to(dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows0", "rows1"])
def _layer_norm_bwd_kernel(
    grad0,  # [N0, D]
    grad1,  # [N1, D]
    stride_g,
    x0,  # [N0, D]
    x1,  # [N1, D]
    stride_x0,
    stride_x1,
    rows0,
    rows1,
    weight,  # [D]
    mean0,  # [N0]
    mean1,  # [N1]
    rstd0,  # [N0]
    rstd1,  # [N1]
    dx0,  # [N0, D]
    dx1,  # [N1, D]
    D: tl.constexpr,
    STREAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, BLOCK_N)
    if STREAMS == 1 or tile < tiles0:
        _bwd_tile(grad0, stride_g, x0, stride_x0, rows0, weight, mean0, rstd0, dx0, tile, D, BLOCK_N, BLOCK_D)
    else:
        _bwd_tile(grad1, stride_g, x1, stride_x1, rows1, weight, mean1, rstd1, dx1, tile - tiles0, D, BLOCK_N, BLOCK_D)


def _candidates(channels: int) -> list[launch.Config]:
    # A program reads its rows once and whole; 4096 numbers give each thread of four warps 32, a few loads in flight.
    block = triton.next_power_of_2(channels)
    sizes = ((4096, 4), (2048, 4), (8192, 8))
    return [{"BLOCK_N": max(1, n // block), "BLOCK_D": block, "num_warps": w, "num_stages": 1} for n, w in sizes]


def _grid(xs: Sequence[Tensor]):
    return lambda config: (sum(triton.cdiv(len(x), config["BLOCK_N"]) for x in xs),)


def _ends(packed: Tensor, xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The first and the last stream's part of rows that lie one behind the other."""
    parts = packed.split([len(x) for x in xs])
    return parts[0], parts[-1]


def layer_norm_fwd(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized rows ``[N0 + N1, D]`` in ``dtype``, mean and 1 / deviation ``[N0 + N1]`` float32, of one or two ``[N, D]``."""
    xs = [launch.unit_stride(x) for x in xs]
    first, last = xs[0], xs[-1]
    channels = first.shape[1]
    total = sum(len(x) for x in xs)
    y = first.new_empty(total, channels, dtype=dtype)
    mean, rstd = (first.new_empty(total, dtype=torch.float32) for _ in range(2))
    launch.run(
        _layer_norm_fwd_kernel,
        _grid(xs),
        *(first, last, first.stride(0), last.stride(0), len(first), len(last)),
        *(weight, bias, *_ends(y, xs), *_ends(mean, xs), *_ends(rstd, xs), eps),
        candidates=_candidates(channels),
        D=channels,
        STREAMS=len(xs),
    )
    return y, mean, rstd


def layer_norm_bwd(grad: Tensor, xs: Sequence[Tensor], weight: Tensor, mean: Tensor, rstd: Tensor) -> list[Tensor]:
    """Gradients of the ``[N, D]`` inputs from that of the rows ``[N0 + N1, D]``."""
    grad, xs = launch.unit_stride(grad), [launch.unit_stride(x) for x in xs]
    first, last = xs[0], xs[-1]
    channels = first.shape[1]
    dxs = [x.new_empty(x.shape) for x in xs]
    launch.run(
        _layer_norm_bwd_kernel,
        _grid(xs),
        *(*_ends(grad, xs), grad.stride(0)),
        *(first, last, first.stride(0), last.stride(0), len(first), len(last)),
        *(weight, *_ends(mean, xs), *_ends(rstd, xs), dxs[0], dxs[-1]),
        candidates=_candidates(channels),
        D=channels,
        STREAMS=len(xs),
    )
    return dxs
