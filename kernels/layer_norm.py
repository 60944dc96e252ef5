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
def _elements(o_n, o_d, stride, side, D: tl.constexpr, MERGE: tl.constexpr):
    """Offsets of the channels ``o_d`` of the rows ``o_n``: of a token, or where MERGE of 2 x 2 tokens of a square grid."""
    if MERGE:
        half = side // 2
        token = o_n // (half * half) * (side * side) + o_n // half % half * (2 * side) + o_n % half * 2
        # Published order of the four: down the first column, then down the second.
        neighbour = o_d // (D // 4)
        step = neighbour % 2 * side + neighbour // 2
        offsets = (token[:, None] + step[None, :]) * stride + (o_d % (D // 4))[None, :]
    else:
        offsets = o_n[:, None] * stride + o_d[None, :]
    return offsets


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
    side,
    tile,
    D: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < rows, o_d < D
    m = m_n[:, None] & m_d[None, :]
    b_x = tl.load(x + _elements(o_n, o_d, stride_x, side, D, MERGE), mask=m, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, 1) / D
    b_centred = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_rstd = 1 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / D + eps)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_b = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_centred * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(y + o_n[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m)
    tl.store(mean + o_n, b_mean, mask=m_n)
    tl.store(rstd + o_n, b_rstd, mask=m_n)


@triton.jit(
    do_not_specialize=["rows0", "rows1", "side"],
    # Where the second stream begins depends on the batch size, and so does what its address is divisible by.
    do_not_specialize_on_alignment=["mean0", "mean1", "rstd0", "rstd1"],
)
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
    side,
    D: tl.constexpr,
    STREAMS: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, BLOCK_N)
    if STREAMS == 1 or tile < tiles0:
        _fwd_tile(x0, stride_x0, rows0, weight, bias, y0, mean0, rstd0, eps, side, tile, D, MERGE, BLOCK_N, BLOCK_D)
    else:
        _fwd_tile(x1, stride_x1, rows1, weight, bias, y1, mean1, rstd1, eps, side, tile - tiles0, D, MERGE, BLOCK_N, BLOCK_D)


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
    again,  # [N, D]
    stride_a,
    dx,  # [N, D]
    side,
    tile,
    D: tl.constexpr,
    MERGE: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < rows, o_d < D
    m = m_n[:, None] & m_d[None, :]
    b_g = tl.load(grad + o_n[:, None] * stride_g + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_x = tl.load(x + _elements(o_n, o_d, stride_x, side, D, MERGE), mask=m, other=0.0).to(tl.float32)
    b_mean = tl.load(mean + o_n, mask=m_n, other=0.0)
    b_rstd = tl.load(rstd + o_n, mask=m_n, other=0.0)
    # Masked channels have a gradient of zero, so they do not count in either mean.
    b_wg = b_g * tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_xhat = (b_x - b_mean[:, None]) * b_rstd[:, None]
    b_dx = b_wg - (tl.sum(b_wg, 1) / D)[:, None] - b_xhat * (tl.sum(b_wg * b_xhat, 1) / D)[:, None]
    b_dx *= b_rstd[:, None]
    if AGAIN:
        b_dx += tl.load(again + o_n[:, None] * stride_a + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    p_dx = dx + _elements(o_n, o_d, D // 4 if MERGE else D, side, D, MERGE)
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m)


@triton.jit(
    do_not_specialize=["rows0", "rows1", "side"],
    # Where the second stream begins depends on the batch size, and so does what its address is divisible by.
    do_not_specialize_on_alignment=["mean0", "mean1", "rstd0", "rstd1"],
)
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
    again0,  # [N0, D]
    again1,  # [N1, D]
    stride_a0,
    stride_a1,
    dx0,  # [N0, D]
    dx1,  # [N1, D]
    side,
    D: tl.constexpr,
    STREAMS: tl.constexpr,
    MERGE: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, BLOCK_N)
    if STREAMS == 1 or tile < tiles0:
        _bwd_tile(
            *(grad0, stride_g, x0, stride_x0, rows0, weight, mean0, rstd0, again0, stride_a0, dx0),
            *(side, tile, D, MERGE, AGAIN, BLOCK_N, BLOCK_D),
        )
    else:
        _bwd_tile(
            *(grad1, stride_g, x1, stride_x1, rows1, weight, mean1, rstd1, again1, stride_a1, dx1),
            *(side, tile - tiles0, D, MERGE, AGAIN, BLOCK_N, BLOCK_D),
        )


def _candidates(channels: int) -> list[launch.Config]:
    # A program reads its rows once and whole; 4096 numbers give each thread of four warps 32, a few loads in flight.
    block = triton.next_power_of_2(channels)
    sizes = ((4096, 4), (2048, 4), (8192, 8))
    return [{"BLOCK_N": max(1, n // block), "BLOCK_D": block, "num_warps": w, "num_stages": 1} for n, w in sizes]


def _rows(xs: Sequence[Tensor], side: int) -> list[int]:
    """Normalized rows of each stream."""
    return [len(x) // 4 if side else len(x) for x in xs]


def _grid(rows: Sequence[int]):
    return lambda config: (sum(triton.cdiv(n, config["BLOCK_N"]) for n in rows),)


def _ends(packed: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first and the last stream's part of rows that lie one behind the other."""
    parts = packed.split(list(rows))
    return parts[0], parts[-1]


def layer_norm_fwd(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float, side: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized rows ``[N0 + N1, D]`` in ``dtype``, mean and 1 / deviation ``[N0 + N1]`` float32, of one or two ``[N, D]``.

    With ``side`` the inputs are ``[4 N, D / 4]``, square grids of tokens, of which a row is 2 x 2.
    """
    xs, weight, bias = [launch.unit_stride(x) for x in xs], weight.contiguous(), bias.contiguous()
    first, last = xs[0], xs[-1]
    channels, rows = len(weight), _rows(xs, side)
    total = sum(rows)
    y = first.new_empty(total, channels, dtype=dtype)
    mean, rstd = (first.new_empty(total, dtype=torch.float32) for _ in range(2))
    launch.run(
        _layer_norm_fwd_kernel,
        _grid(rows),
        *(first, last, first.stride(0), last.stride(0), rows[0], rows[-1]),
        *(weight, bias, *_ends(y, rows), *_ends(mean, rows), *_ends(rstd, rows), eps, side),
        candidates=_candidates(channels),
        D=channels,
        STREAMS=len(xs),
        MERGE=bool(side),
    )
    return y, mean, rstd


def layer_norm_bwd(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    again: Sequence[Tensor],
    side: int,
) -> list[Tensor]:
    """Gradients of the inputs of `layer_norm_fwd` from that of its rows ``[N0 + N1, D]``.

    ``again`` is added to them: the gradients ``[N, D]`` of the inputs from elsewhere, of all or none.
    """
    grad, xs, weight = launch.unit_stride(grad), [launch.unit_stride(x) for x in xs], weight.contiguous()
    first, last = xs[0], xs[-1]
    channels, rows = len(weight), _rows(xs, side)
    dxs = [x.new_empty(x.shape) for x in xs]
    added = [launch.unit_stride(x) for x in again] or dxs
    launch.run(
        _layer_norm_bwd_kernel,
        _grid(rows),
        *(*_ends(grad, rows), grad.stride(0)),
        *(first, last, first.stride(0), last.stride(0), rows[0], rows[-1]),
        *(weight, *_ends(mean, rows), *_ends(rstd, rows)),
        *(added[0], added[-1], added[0].stride(0), added[-1].stride(0), dxs[0], dxs[-1], side),
        candidates=_candidates(channels),
        D=channels,
        STREAMS=len(xs),
        MERGE=bool(side),
        AGAIN=bool(again),
    )
    return dxs
