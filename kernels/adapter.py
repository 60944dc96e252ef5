"""The bottleneck adapter, for one or two streams in one launch. Card: docs/ops/adapter.md.

N rows of a stream, D channels, R rank in tiles of RA + RB. Streams have their own tokens, weights and outputs; a program works
on rows of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import (
    dot,
    from_rank,
    gelu,
    gelu_grad,
    load_split,
    load_vector_split,
    row_block,
    store_split,
    to_rank,
    zeros_split,
)


@triton.jit
def preactivation(
    x, stride_x, o_n, m_n, down_weight, down_bias, D, R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BLOCK_D:
    tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x W_d^T + b_d`` for rows ``o_n``, as two float32 tiles."""
    z_a, z_b = to_rank(x, stride_x, o_n, m_n, down_weight, D, 1, D, R, RA, RB, BLOCK_D, DTYPE, PRECISION)
    bias_a, bias_b = load_vector_split(down_bias, R, RA, RB)
    z_a += bias_a[None, :]
    if RB > 0:
        z_b += bias_b[None, :]
    return z_a, z_b


@triton.jit
def expand(
    h_a, h_b, o_n, m_n, up_weight, up_bias, scale, x, stride_x, residual, stride_r, out, D, R: tl.constexpr, RA: tl.constexpr,
    RB: tl.constexpr, SCALE: tl.constexpr, ADD_X: tl.constexpr, ADD_RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION:
    tl.constexpr,
):  # fmt: skip
    """Write rows ``o_n`` of ``h W_u^T + b_u``, each times its scale where SCALE, plus x and the residual where they are to be
    added."""
    if SCALE:
        b_scale = tl.load(scale + o_n, mask=m_n, other=0.0).to(tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m = m_n[:, None] & (o_d < D)[None, :]
        acc = from_rank(h_a, h_b, o_d, up_weight, 1, R, D, R, RA, RB, PRECISION)
        acc += tl.load(up_bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
        if SCALE:
            acc *= b_scale[:, None]
        if ADD_X:
            acc += tl.load(x + o_n[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        if ADD_RESIDUAL:
            acc += tl.load(residual + o_n[:, None] * stride_r + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(out + o_n[:, None] * D + o_d[None, :], acc.to(out.dtype.element_ty), mask=m)


@triton.jit
def _adapter_fwd_tile(
    x,  # [N, D]
    stride_x,
    residual,  # [N, D]
    stride_r,
    down_weight,  # [R, D]
    down_bias,  # [R]
    up_weight,  # [D, R]
    up_bias,  # [D]
    scale,  # [N]
    out,  # [N, D]
    rows,
    tile,
    D,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    SCALE: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first, o_n, m_n = row_block(tile, rows, BLOCK_N)
    x += first * stride_x
    residual += first * stride_r
    out += first * D
    z_a, z_b = preactivation(x, stride_x, o_n, m_n, down_weight, down_bias, D, R, RA, RB, BLOCK_D, DTYPE, PRECISION)
    h_a, h_b = gelu(z_a).to(DTYPE), gelu(z_b).to(DTYPE)
    expand(
        h_a, h_b, o_n, m_n, up_weight, up_bias, scale + first, x, stride_x, residual, stride_r, out, D, R, RA, RB, SCALE, False,
        ADD_RESIDUAL, BLOCK_D, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows0", "rows1"])
def _adapter_fwd_kernel(
    x0, x1, stride_x0, stride_x1, residual0, residual1, stride_r0, stride_r1, down_weight0, down_weight1, down_bias0,
    down_bias1, up_weight0, up_weight1, up_bias0, up_bias1, scale0, scale1, out0, out1, rows0, rows1, D, R: tl.constexpr, RA:
    tl.constexpr, RB: tl.constexpr, STREAMS: tl.constexpr, SCALE: tl.constexpr, ADD_RESIDUAL: tl.constexpr, DTYPE:
    tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, BLOCK_N)
    if STREAMS == 1 or tile < tiles0:
        _adapter_fwd_tile(
            x0, stride_x0, residual0, stride_r0, down_weight0, down_bias0, up_weight0, up_bias0, scale0, out0, rows0, tile, D,
            R, RA, RB, SCALE, ADD_RESIDUAL, DTYPE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _adapter_fwd_tile(
            x1, stride_x1, residual1, stride_r1, down_weight1, down_bias1, up_weight1, up_bias1, scale1, out1, rows1, tile -
            tiles0, D, R, RA, RB, SCALE, ADD_RESIDUAL, DTYPE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _adapter_bwd_tile(
    grad,  # [N, D] of the output
    stride_g,
    x,  # [N, D]
    stride_x,
    down_weight,  # [R, D]
    down_bias,  # [R]
    up_weight,  # [D, R]
    scale,  # [N]
    hidden_grad,  # [N, R], read where ACROSS
    hidden,  # [N, R], written where not ACROSS and NEEDS_WEIGHTS
    dz,  # [N, R], written where NEEDS_WEIGHTS
    dx,  # [N, D], written where NEEDS_X
    rows,
    tile,
    D,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    SCALE: tl.constexpr,
    ACROSS: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first, o_n, m_n = row_block(tile, rows, BLOCK_N)
    grad += first * stride_g
    x += first * stride_x
    z_a, z_b = preactivation(x, stride_x, o_n, m_n, down_weight, down_bias, D, R, RA, RB, BLOCK_D, DTYPE, PRECISION)
    if ACROSS:
        dh_a, dh_b = load_split(hidden_grad + first * R, o_n, m_n, R, RA, RB, tl.float32)
    else:
        dh_a, dh_b = to_rank(grad, stride_g, o_n, m_n, up_weight, 1, R, D, R, RA, RB, BLOCK_D, DTYPE, PRECISION)
        h_a, h_b = gelu(z_a), gelu(z_b)
        if SCALE:
            b_scale = tl.load(scale + first + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
            dh_a, dh_b, h_a, h_b = dh_a * b_scale, dh_b * b_scale, h_a * b_scale, h_b * b_scale
        if NEEDS_WEIGHTS:
            store_split(hidden + first * R, o_n, m_n, h_a, h_b, R, RA, RB)
    dz_a = (dh_a * gelu_grad(z_a)).to(DTYPE)
    dz_b = (dh_b * gelu_grad(z_b)).to(DTYPE)
    if NEEDS_WEIGHTS:
        store_split(dz + first * R, o_n, m_n, dz_a, dz_b, R, RA, RB)
    if NEEDS_X:
        dx += first * D
        for start in range(0, D, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            m = m_n[:, None] & (o_d < D)[None, :]
            acc = from_rank(dz_a, dz_b, o_d, down_weight, D, 1, D, R, RA, RB, PRECISION)
            if ACROSS:
                acc += tl.load(grad + o_n[:, None] * stride_g + o_d[None, :], mask=m, other=0.0).to(tl.float32)
            tl.store(dx + o_n[:, None] * D + o_d[None, :], acc.to(dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows0", "rows1"])
def _adapter_bwd_kernel(
    grad0, grad1, stride_g0, stride_g1, x0, x1, stride_x0, stride_x1, down_weight0, down_weight1, down_bias0, down_bias1,
    up_weight0, up_weight1, scale0, scale1, hidden_grad0, hidden_grad1, hidden0, hidden1, dz0, dz1, dx0, dx1, rows0, rows1, D,
    R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, STREAMS: tl.constexpr, SCALE: tl.constexpr, ACROSS: tl.constexpr,
    NEEDS_X: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, BLOCK_N)
    if STREAMS == 1 or tile < tiles0:
        _adapter_bwd_tile(
            grad0, stride_g0, x0, stride_x0, down_weight0, down_bias0, up_weight0, scale0, hidden_grad0, hidden0, dz0, dx0,
            rows0, tile, D, R, RA, RB, SCALE, ACROSS, NEEDS_X, NEEDS_WEIGHTS, DTYPE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _adapter_bwd_tile(
            grad1, stride_g1, x1, stride_x1, down_weight1, down_bias1, up_weight1, scale1, hidden_grad1, hidden1, dz1, dx1,
            rows1, tile - tiles0, D, R, RA, RB, SCALE, ACROSS, NEEDS_X, NEEDS_WEIGHTS, DTYPE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _weight_grad_tile(
    wide,  # [N, D]
    stride_w,
    narrow,  # [N, R]
    scale,  # [N]
    out,  # [D * R + (R if DOWN else D)]
    first,
    last,
    o_d,
    DOWN: tl.constexpr,
    SCALE: tl.constexpr,
    D,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_D: tl.constexpr = o_d.shape[0]
    m_d = o_d < D
    acc_a, acc_b = zeros_split(BLOCK_D, RA, RB)
    bias_wide = tl.zeros([BLOCK_D], tl.float32)
    bias_a, bias_b = tl.zeros([RA], tl.float32), tl.zeros([RA if RB == 0 else RB], tl.float32)
    zero = tl.zeros([], tl.int64)
    for start in range(first, last, BLOCK_N):
        o_n = tl.arange(0, BLOCK_N)
        m_n = start + o_n < last
        row = zero + start  # in 64 bits, for the pointers
        p_w = wide + row * stride_w + o_n[:, None] * stride_w + o_d[None, :]
        b_w = tl.load(p_w, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_a, b_b = load_split(narrow + row * R, o_n, m_n, R, RA, RB, narrow.dtype.element_ty)
        b_t = tl.trans(b_w.to(b_a.dtype))
        acc_a = dot(b_t, b_a, acc_a, PRECISION)
        if RB > 0:
            acc_b = dot(b_t, b_b, acc_b, PRECISION)
        if DOWN:
            bias_a += tl.sum(b_a.to(tl.float32), 0)
            bias_b += tl.sum(b_b.to(tl.float32), 0)
        elif SCALE:
            b_scale = tl.load(scale + row + o_n, mask=m_n, other=0.0).to(tl.float32)
            bias_wide += tl.sum(b_w.to(tl.float32) * b_scale[:, None], 0)
        else:
            bias_wide += tl.sum(b_w.to(tl.float32), 0)
    o_a = tl.arange(0, RA)
    stride_d = 1 if DOWN else R
    stride_r = D if DOWN else 1
    m_a = o_a < R
    p_d = out + o_d[:, None] * stride_d
    tl.store(p_d + o_a[None, :] * stride_r, acc_a, mask=m_d[:, None] & m_a[None, :])
    if RB > 0:
        o_b = RA + tl.arange(0, RB)
        tl.store(p_d + o_b[None, :] * stride_r, acc_b, mask=m_d[:, None] & (o_b < R)[None, :])
    if DOWN:
        # Every block of channels has summed the same narrow rows; the first one writes them.
        leads = tl.program_id(0) == 0
        tl.store(out + D * R + o_a, bias_a, mask=m_a & leads)
        if RB > 0:
            o_b = RA + tl.arange(0, RB)
            tl.store(out + D * R + o_b, bias_b, mask=(o_b < R) & leads)
    else:
        tl.store(out + D * R + o_d, bias_wide, mask=m_d)


@triton.jit(do_not_specialize=["rows0", "rows1"])
def _adapter_bwd_weight_kernel(
    wide0,  # [N0, D]
    wide1,  # [N1, D]
    stride_w0,
    stride_w1,
    narrow0,  # [N0, R]
    narrow1,  # [N1, R]
    scale0,  # [N0], read where SCALE
    scale1,  # [N1]
    partial0,  # [splits, D * R + (R if DOWN else D)]
    partial1,
    rows0,
    rows1,
    D,
    DOWN: tl.constexpr,
    SCALE: tl.constexpr,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split, splits = tl.program_id(1), tl.num_programs(1)
    width = D * R + (R if DOWN else D)
    if tl.program_id(2) == 0:
        share = tl.cdiv(tl.cdiv(rows0, BLOCK_N), splits) * BLOCK_N
        _weight_grad_tile(
            wide0, stride_w0, narrow0, scale0, partial0 + split * width, split * share, tl.minimum((split + 1) * share, rows0),
            o_d, DOWN, SCALE, D, R, RA, RB, PRECISION, BLOCK_N,
        )  # fmt: skip
    else:
        share = tl.cdiv(tl.cdiv(rows1, BLOCK_N), splits) * BLOCK_N
        _weight_grad_tile(
            wide1, stride_w1, narrow1, scale1, partial1 + split * width, split * share, tl.minimum((split + 1) * share, rows1),
            o_d, DOWN, SCALE, D, R, RA, RB, PRECISION, BLOCK_N,
        )  # fmt: skip


def _candidates(*sizes: tuple[int, int, int, int]) -> list[launch.Config]:
    return [{"BLOCK_N": n, "BLOCK_D": d, "num_warps": warps, "num_stages": stages} for n, d, warps, stages in sizes]


def row_candidates(x: Tensor, dtype: torch.dtype, rank: int) -> list[launch.Config]:
    """Configurations of a kernel that takes rows from D to r and back, by card, rank and the dtype of its products."""
    if dtype == torch.float32:
        return _candidates((32, 32, 8, 2), (64, 32, 8, 2))
    # Two accumulators of 64 x 128 want the registers of eight warps.
    narrow = _candidates((64, 64, 4, 2), (64, 32, 4, 3))
    narrow = narrow if launch.capability(x)[0] < 10 else narrow[::-1]
    wide = _candidates((64, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2))
    return [*narrow, *wide] if rank <= 96 else [*wide, *narrow]


def row_grid(xs: Sequence[Tensor]):
    """A program for each block of rows of each stream."""
    return lambda config: (sum(triton.cdiv(len(x), config["BLOCK_N"]) for x in xs),)


def ends(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The first and the last stream's tensor, as the kernels take them; the same one twice where there is one stream."""
    return xs[0], xs[-1]


def strides(xs: Sequence[Tensor]) -> tuple[int, int]:
    """Distance between rows of the first and the last stream."""
    return xs[0].stride(0), xs[-1].stride(0)


def contiguous(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Weights as the kernels address them."""
    return [[x.contiguous() for x in xs] for xs in lists]


def adapter_fwd(
    xs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    scales: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    up_biases: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """``residual + scale * up(gelu(down(x)))`` of one or two streams ``[N, D]``; ``residuals`` and ``scales [N]`` may be empty.

    Products run in ``dtype``, which the output has too unless the residuals' is wider.
    """
    xs = [launch.unit_stride(x) for x in xs]
    added = [launch.unit_stride(x) for x in residuals] or xs
    down_weights, down_biases, up_weights, up_biases = contiguous(down_weights, down_biases, up_weights, up_biases)
    rank, channels = down_weights[0].shape
    wide = torch.promote_types(dtype, residuals[0].dtype) if residuals else dtype
    outs = [x.new_empty(x.shape, dtype=wide) for x in xs]
    launch.run(
        _adapter_fwd_kernel,
        row_grid(xs),
        *(*ends(xs), *strides(xs), *ends(added), *strides(added)),
        *(*ends(down_weights), *ends(down_biases), *ends(up_weights), *ends(up_biases)),
        *(*ends(scales or xs), *ends(outs), len(xs[0]), len(xs[-1]), channels),
        candidates=row_candidates(xs[0], dtype, rank),
        **launch.split_rank(rank),
        STREAMS=len(xs),
        SCALE=bool(scales),
        ADD_RESIDUAL=bool(residuals),
        DTYPE=launch.triton_dtype(dtype),
        PRECISION=launch.precision(dtype),
    )
    return outs


def adapter_bwd(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    needs_x: bool,
    needs_weights: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the inputs as packed rows ``[N0 + N1, D]``, and of the weights as `weight_grads` packs them: up, then down.

    What is not needed is empty.
    """
    dx = xs[0].new_empty(sum(map(len, xs)) if needs_x else 0, xs[0].shape[1])
    hiddens, dzs = down_bwd(grads, xs, scales, down_weights, down_biases, up_weights, None, dx, needs_weights, dtype)
    if not needs_weights:
        return dx, []
    return dx, [weight_grads(grads, hiddens, scales, down=False), weight_grads(xs, dzs, [], down=True)]


def down_bwd(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    hidden_grads: Sequence[Tensor] | None,
    dx: Tensor,
    needs_weights: bool,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """Through GELU and down-projection: hidden tokens ``[N, r]`` and gradients of what GELU took ``[N, r]``.

    The gradients of all x fill the packed rows ``dx [N0 + N1, D]``, unless it is empty.

    With ``hidden_grads [N, r]`` these come from the cross-attention, and x is also added to the output: its gradient includes
    that of the output. Without, they are computed from the output's gradient, and only then are hidden tokens returned, times
    their ``scales`` if there are any. What is not needed is an empty list.
    """
    grads, xs = ([launch.unit_stride(x) for x in each] for each in (grads, xs))
    down_weights, down_biases, up_weights = contiguous(down_weights, down_biases, up_weights)
    rank, channels = down_weights[0].shape
    across = hidden_grads is not None
    hiddens = [x.new_empty(len(x), rank, dtype=dtype) for x in xs] if needs_weights and not across else []
    dzs = [x.new_empty(len(x), rank, dtype=dtype) for x in xs] if needs_weights else []
    dxs = dx.split([len(x) for x in xs]) if len(dx) else []
    launch.run(
        _adapter_bwd_kernel,
        row_grid(xs),
        *(*ends(grads), *strides(grads), *ends(xs), *strides(xs)),
        *(*ends(down_weights), *ends(down_biases), *ends(up_weights)),
        # A kernel never touches what its flags say it need not; any tensor stands in for it.
        *(*ends(scales or xs), *ends(hidden_grads or xs), *ends(hiddens or xs), *ends(dzs or xs), *ends(dxs or xs)),
        *(len(xs[0]), len(xs[-1]), channels),
        candidates=row_candidates(xs[0], dtype, rank),
        **launch.split_rank(rank),
        STREAMS=len(xs),
        SCALE=bool(scales),
        ACROSS=across,
        NEEDS_X=len(dx) > 0,
        NEEDS_WEIGHTS=needs_weights,
        DTYPE=launch.triton_dtype(dtype),
        PRECISION=launch.precision(dtype),
    )
    return hiddens, dzs


# Programs a launch of the weights' gradients aims at, each with rows of its own: about two for each multiprocessor of a large
# GPU. A fixed number, so that sums are split alike on every machine.
_WEIGHT_PROGRAMS = 256


def weight_grads(wides: Sequence[Tensor], narrows: Sequence[Tensor], scales: Sequence[Tensor], *, down: bool) -> Tensor:
    """Gradients of a projection's weight and bias, flat and one behind the other, float32: a row for each stream.

    Args:
        wides: ``[N, D]``, the upstream gradients (up) or the inputs (down).
        narrows: ``[N, r]``, the hidden tokens (up), times their scale, or the gradients before GELU (down).
        scales: ``[N]``, of the rows that the bias's gradient (up) adds up; may be empty.
        down: whether the weight is ``[r, D]`` and the bias ``[r]``, not ``[D, r]`` and ``[D]``.
    """
    wides = [launch.unit_stride(x) for x in wides]
    channels, rank = wides[0].shape[1], narrows[0].shape[1]
    candidates = (
        _candidates((32, 32, 8, 2))
        if narrows[0].dtype == torch.float32
        else _candidates((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3))
    )
    tiles = len(wides) * triton.cdiv(channels, 64)
    splits = max(1, min(_WEIGHT_PROGRAMS // tiles, triton.cdiv(max(map(len, wides)), 64)))
    partials = narrows[0].new_empty(len(wides), splits, channels * rank + (rank if down else channels), dtype=torch.float32)
    launch.run(
        _adapter_bwd_weight_kernel,
        lambda config: (triton.cdiv(channels, config["BLOCK_D"]), splits, len(wides)),
        *(*ends(wides), *strides(wides), *ends(narrows), *ends(scales or narrows), *ends(partials)),
        *(len(wides[0]), len(wides[-1]), channels),
        candidates=candidates,
        DOWN=down,
        SCALE=bool(scales),
        **launch.split_rank(rank),
        PRECISION=launch.precision(narrows[0].dtype),
    )
    return partials.sum(1) if splits > 1 else partials[:, 0]
