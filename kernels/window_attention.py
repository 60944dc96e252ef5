"""Swin's window attention on the image layout. Card: docs/ops/window_attention.md.

F frames of H x W tokens, h heads of D channels, L = WINDOW**2 tokens a window. The cyclic shift, the cut into windows, the
mask of the shift and the way back are index arithmetic. Neighbouring programs take neighbouring heads, which lie side by side
in memory. A window of up to 64 tokens is one tile, and a program keeps the bias of its head over a run of windows; a program
owns one larger window and goes over it in blocks. Scores are in units of log 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import dot


@triton.jit
def _place(w, o_l, height, width, shift, WINDOW: tl.constexpr):
    """Frame, row and column in the image of tokens ``o_l`` of window ``w``, and the number of their region of the mask."""
    across = width // WINDOW
    windows = height // WINDOW * across
    top, left = w % windows // across * WINDOW, w % across * WINDOW
    # After the cyclic shift the last rows and columns come from the opposite border; inside a window they alone differ.
    down, right = o_l >= (height - shift - top) * WINDOW, o_l % WINDOW >= width - shift - left
    row, column = top + o_l // WINDOW + shift, left + o_l % WINDOW + shift
    row, column = tl.where(down, row - height, row), tl.where(right, column - width, column)
    region = 2 * down.to(tl.int32) + right.to(tl.int32)
    return (w // windows).to(tl.int64), row.to(tl.int64), column.to(tl.int64), region


@triton.jit
def _tile(x, o_x, m_l, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses of the channels of tokens at ``o_x``, and which of them exist."""
    o_d = tl.arange(0, BLOCK_D)
    return x + o_x[:, None] + o_d[None, :], m_l[:, None] & (o_d < D)[None, :]


@triton.jit
def _load(x, o_x, m_l, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, mask = _tile(x, o_x, m_l, D, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(x, o_x, m_l, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, mask = _tile(x, o_x, m_l, D, BLOCK_D)
    tl.store(pointers, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _bias(bias, o_query, o_key, L: tl.constexpr):
    """Bias of queries and keys, one along each axis; minus infinity for keys that are padding."""
    b_bias = tl.load(bias + o_query * L + o_key, mask=(o_query < L) & (o_key < L), other=0.0).to(tl.float32)
    return tl.where(o_key < L, b_bias * 1.4426950408889634, float("-inf"))


@triton.jit
def _scores(b_x, b_y, b_bias, region_x, region_y, scale, SHIFTED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of queries ``x`` and keys ``y``, or the other way round."""
    b_s = dot(b_x, tl.trans(b_y), tl.zeros_like(b_bias), PRECISION) * (scale * 1.4426950408889634) + b_bias
    if SHIFTED:
        b_s = tl.where(region_x[:, None] == region_y[None, :], b_s, b_s - 144.26950408889634)
    return b_s


@triton.jit
def _keys(
    b_q,
    o_m,
    region_m,
    w,
    n,
    qkv,
    stride_f,
    stride_h,
    stride_w,
    stride_3,
    bias,
    height,
    width,
    shift,
    scale,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of the queries ``o_m`` and the keys from ``n`` on, these keys, and their values."""
    L: tl.constexpr = WINDOW * WINDOW
    o_n = n + tl.arange(0, BLOCK_N)
    frame, row, column, region_n = _place(w, o_n, height, width, shift, WINDOW)
    o_x = frame * stride_f + row * stride_h + column * stride_w
    b_k = _load(qkv + stride_3, o_x, o_n < L, D, BLOCK_D)
    b_v = _load(qkv + 2 * stride_3, o_x, o_n < L, D, BLOCK_D)
    b_bias = _bias(bias, o_m[:, None], o_n[None, :], L)
    return _scores(b_q, b_k, b_bias, region_m, region_n, scale, SHIFTED, PRECISION), b_k, b_v


@triton.jit
def _window_attention_fwd_kernel(
    qkv,  # [F, H, W, 3, h, D]
    stride_f,
    stride_h,
    stride_w,
    stride_3,
    stride_n,
    bias,  # [h, L, L]
    out,  # [F, H, W, h * D]
    height,
    width,
    shift,
    windows,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    L: tl.constexpr = WINDOW * WINDOW
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(0) // HEADS * RUN
    qkv += head * stride_n
    o_l = tl.arange(0, BLOCK_L)
    m_l = o_l < L
    b_bias = _bias(bias + head * L * L, o_l[:, None], o_l[None, :], L)
    for w in range(first, tl.minimum(first + RUN, windows)):
        frame, row, column, region = _place(w, o_l, height, width, shift, WINDOW)
        o_x = frame * stride_f + row * stride_h + column * stride_w
        b_q = _load(qkv, o_x, m_l, D, BLOCK_D)
        b_k = _load(qkv + stride_3, o_x, m_l, D, BLOCK_D)
        b_v = _load(qkv + 2 * stride_3, o_x, m_l, D, BLOCK_D)
        b_s = _scores(b_q, b_k, b_bias, region, region, scale, SHIFTED, PRECISION)
        b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
        b_o = dot(b_p.to(b_v.dtype), b_v, tl.zeros([BLOCK_L, BLOCK_D], tl.float32), PRECISION)
        b_o = b_o / tl.sum(b_p, 1)[:, None]
        o_out = ((frame * height + row) * width + column) * (HEADS * D) + head * D
        _store(out, o_out, m_l, b_o, D, BLOCK_D)


@triton.jit
def _window_attention_bwd_kernel(
    grad,  # [F, H, W, h * D]
    stride_gf,
    stride_gh,
    stride_gw,
    qkv,  # [F, H, W, 3, h, D]
    stride_f,
    stride_h,
    stride_w,
    stride_3,
    stride_n,
    bias,  # [h, L, L]
    dqkv,  # [F, H, W, 3, h, D]
    height,
    width,
    shift,
    windows,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    L: tl.constexpr = WINDOW * WINDOW
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(0) // HEADS * RUN
    grad += head * D
    qkv += head * stride_n
    dqkv += head * D
    o_l = tl.arange(0, BLOCK_L)
    m_l = o_l < L
    b_bias = _bias(bias + head * L * L, o_l[:, None], o_l[None, :], L)
    zeros = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for w in range(first, tl.minimum(first + RUN, windows)):
        frame, row, column, region = _place(w, o_l, height, width, shift, WINDOW)
        o_x = frame * stride_f + row * stride_h + column * stride_w
        b_q = _load(qkv, o_x, m_l, D, BLOCK_D)
        b_k = _load(qkv + stride_3, o_x, m_l, D, BLOCK_D)
        b_v = _load(qkv + 2 * stride_3, o_x, m_l, D, BLOCK_D)
        b_g = _load(grad, frame * stride_gf + row * stride_gh + column * stride_gw, m_l, D, BLOCK_D)
        b_s = _scores(b_q, b_k, b_bias, region, region, scale, SHIFTED, PRECISION)
        b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
        b_p = b_p / tl.sum(b_p, 1)[:, None]
        b_dp = dot(b_g, tl.trans(b_v), tl.zeros_like(b_bias), PRECISION)
        b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])).to(b_q.dtype)
        o_dx = ((frame * height + row) * width + column) * (3 * HEADS * D)
        b_dv = dot(tl.trans(b_p.to(b_g.dtype)), b_g, zeros, PRECISION)
        _store(dqkv + 2 * HEADS * D, o_dx, m_l, b_dv, D, BLOCK_D)
        b_dq = dot(b_ds, b_k, zeros, PRECISION) * scale
        _store(dqkv, o_dx, m_l, b_dq, D, BLOCK_D)
        b_dk = dot(tl.trans(b_ds), b_q, zeros, PRECISION) * scale
        _store(dqkv + HEADS * D, o_dx, m_l, b_dk, D, BLOCK_D)


@triton.jit
def _window_attention_blocks_fwd_kernel(
    qkv,  # [F, H, W, 3, h, D]
    stride_f,
    stride_h,
    stride_w,
    stride_3,
    stride_n,
    bias,  # [h, L, L]
    out,  # [F, H, W, h * D]
    height,
    width,
    shift,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    L: tl.constexpr = WINDOW * WINDOW
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    w = tl.program_id(0) // HEADS
    qkv += head * stride_n
    bias += head * L * L
    for m in range(0, L, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        frame, row, column, region_m = _place(w, o_m, height, width, shift, WINDOW)
        b_q = _load(qkv, frame * stride_f + row * stride_h + column * stride_w, o_m < L, D, BLOCK_D)
        o_out = ((frame * height + row) * width + column) * (HEADS * D) + head * D
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(0, L, BLOCK_N):
            b_s, _, b_v = _keys(
                *(b_q, o_m, region_m, w, n, qkv, stride_f, stride_h, stride_w, stride_3, bias, height, width, shift, scale),
                *(D, WINDOW, SHIFTED, PRECISION, BLOCK_N, BLOCK_D),
            )
            b_top = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_top[:, None])
            b_shrink = tl.exp2(b_max - b_top)
            b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
            b_o = dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], PRECISION)
            b_max = b_top
        _store(out, o_out, o_m < L, b_o / b_sum[:, None], D, BLOCK_D)


@triton.jit
def _window_attention_blocks_bwd_kernel(
    grad,  # [F, H, W, h * D]
    stride_gf,
    stride_gh,
    stride_gw,
    qkv,  # [F, H, W, 3, h, D]
    stride_f,
    stride_h,
    stride_w,
    stride_3,
    stride_n,
    bias,  # [h, L, L]
    stats,  # [windows, h, 2, L], log-sum-exp and delta, for this kernel alone
    dqkv,  # [F, H, W, 3, h, D]
    height,
    width,
    shift,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    L: tl.constexpr = WINDOW * WINDOW
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    w = tl.program_id(0) // HEADS
    grad += head * D
    qkv += head * stride_n
    bias += head * L * L
    dqkv += head * D
    stats += (w.to(tl.int64) * HEADS + head) * (2 * L)
    # Rows: the statistics of their softmax, then the gradient of their queries.
    for m in range(0, L, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < L
        frame, row, column, region_m = _place(w, o_m, height, width, shift, WINDOW)
        b_q = _load(qkv, frame * stride_f + row * stride_h + column * stride_w, m_m, D, BLOCK_D)
        b_g = _load(grad, frame * stride_gf + row * stride_gh + column * stride_gw, m_m, D, BLOCK_D)
        o_dq = ((frame * height + row) * width + column) * (3 * HEADS * D)
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_delta = tl.zeros([BLOCK_M], tl.float32)
        for n in range(0, L, BLOCK_N):
            b_s, _, b_v = _keys(
                *(b_q, o_m, region_m, w, n, qkv, stride_f, stride_h, stride_w, stride_3, bias, height, width, shift, scale),
                *(D, WINDOW, SHIFTED, PRECISION, BLOCK_N, BLOCK_D),
            )
            b_dp = dot(b_g, tl.trans(b_v), tl.zeros_like(b_s), PRECISION)
            b_top = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_top[:, None])
            b_shrink = tl.exp2(b_max - b_top)
            b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
            b_delta = b_delta * b_shrink + tl.sum(b_p * b_dp, 1)
            b_max = b_top
        b_lse = b_max + tl.log2(b_sum)
        b_delta = b_delta / b_sum
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(0, L, BLOCK_N):
            b_s, b_k, b_v = _keys(
                *(b_q, o_m, region_m, w, n, qkv, stride_f, stride_h, stride_w, stride_3, bias, height, width, shift, scale),
                *(D, WINDOW, SHIFTED, PRECISION, BLOCK_N, BLOCK_D),
            )
            b_dp = dot(b_g, tl.trans(b_v), tl.zeros_like(b_s), PRECISION)
            b_ds = tl.exp2(b_s - b_lse[:, None]) * (b_dp - b_delta[:, None])
            b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq, PRECISION)
        _store(dqkv, o_dq, m_m, b_dq * scale, D, BLOCK_D)
        tl.store(stats + o_m, b_lse, mask=m_m)
        tl.store(stats + L + o_m, b_delta, mask=m_m)
    # Other threads of this program read the statistics than wrote them.
    tl.debug_barrier()
    # Columns: the gradients of their keys and values, from the transposed scores.
    for n in range(0, L, BLOCK_M):
        o_n = n + tl.arange(0, BLOCK_M)
        m_n = o_n < L
        frame, row_n, column_n, region_n = _place(w, o_n, height, width, shift, WINDOW)
        o_x = frame * stride_f + row_n * stride_h + column_n * stride_w
        b_k = _load(qkv + stride_3, o_x, m_n, D, BLOCK_D)
        b_v = _load(qkv + 2 * stride_3, o_x, m_n, D, BLOCK_D)
        o_dk = ((frame * height + row_n) * width + column_n) * (3 * HEADS * D)
        b_dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for m in range(0, L, BLOCK_N):
            o_m = m + tl.arange(0, BLOCK_N)
            m_m = o_m < L
            frame, row_m, column_m, region_m = _place(w, o_m, height, width, shift, WINDOW)
            b_q = _load(qkv, frame * stride_f + row_m * stride_h + column_m * stride_w, m_m, D, BLOCK_D)
            b_g = _load(grad, frame * stride_gf + row_m * stride_gh + column_m * stride_gw, m_m, D, BLOCK_D)
            # Rows of padding have probability zero.
            b_lse = tl.load(stats + o_m, mask=m_m, other=float("inf"))
            b_delta = tl.load(stats + L + o_m, mask=m_m, other=0.0)
            b_bias = _bias(bias, o_m[None, :], o_n[:, None], L)
            b_s = _scores(b_k, b_q, b_bias, region_n, region_m, scale, SHIFTED, PRECISION)
            b_p = tl.exp2(b_s - b_lse[None, :])
            b_dp = dot(b_v, tl.trans(b_g), tl.zeros_like(b_bias), PRECISION)
            b_dv = dot(b_p.to(b_g.dtype), b_g, b_dv, PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk, PRECISION)
        _store(dqkv + HEADS * D, o_dk, m_n, b_dk * scale, D, BLOCK_D)
        _store(dqkv + 2 * HEADS * D, o_dk, m_n, b_dv, D, BLOCK_D)


def _block_d(qkv: Tensor) -> int:
    return max(16, triton.next_power_of_2(qkv.shape[-1]))


def _is_one_tile(qkv: Tensor, window: int) -> bool:
    # The backward holds all of a window in registers; where the tensor cores read shared memory, wider heads fit.
    widest = 64 if qkv.dtype != torch.float32 and launch.capability(qkv) >= (9, 0) else 32
    return window**2 <= 64 and _block_d(qkv) <= widest


def _whole(qkv: Tensor, window: int) -> list[launch.Config]:
    block_l, block_d = max(16, triton.next_power_of_2(window**2)), _block_d(qkv)
    choices = ((4, 4, 2), (4, 4, 1), (2, 4, 2), (2, 4, 1), (8, 4, 2), (1, 4, 1))
    if launch.precision(qkv.dtype) == "tf32":
        choices = ((4, 8, 1), (2, 8, 1))
    elif qkv.dtype == torch.float32:
        choices = ((4, 16, 1), (2, 16, 1), (4, 8, 1))
    elif launch.capability(qkv) >= (10, 0):
        choices = ((4, 4, 1), *choices)
    return [
        {"RUN": run, "BLOCK_L": block_l, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}
        for run, warps, stages in choices
    ]


def _blocks(qkv: Tensor) -> list[launch.Config]:
    block_d = _block_d(qkv)
    if qkv.dtype == torch.float32:
        choices = ((64, 16, 8, 1), (32, 32, 8, 1)) if block_d <= 32 else ((32, 16, 8, 1), (16, 16, 4, 1))
        if block_d > 64:
            choices = choices[::-1]
    elif block_d <= 32:
        choices = ((64, 16, 4, 2), (64, 32, 4, 1), (64, 16, 4, 1))
        if launch.capability(qkv) >= (9, 0):
            choices = ((64, 32, 4, 2), *choices)
    elif block_d <= 64:
        choices = ((64, 16, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1))
    else:
        choices = ((32, 16, 4, 1), (64, 16, 8, 1), (64, 32, 8, 1))
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}
        for m, n, warps, stages in choices
    ]


def _constants(qkv: Tensor, window: int, shift: int) -> dict[str, Any]:
    *_, heads, head_dim = qkv.shape
    precision = launch.precision(qkv.dtype)
    return {"HEADS": heads, "D": head_dim, "WINDOW": window, "SHIFTED": shift > 0, "PRECISION": precision}


def _windows(qkv: Tensor, window: int) -> int:
    frames, height, width, *_ = qkv.shape
    return frames * (height // window) * (width // window)


def window_attention_fwd(qkv: Tensor, bias: Tensor, window: int, shift: int, scale: float) -> Tensor:
    """Attention ``[F, H, W, h * d]`` in the dtype of ``qkv [F, H, W, 3, h, d]``; ``bias [h, L, L]`` is contiguous."""
    assert bias.is_contiguous()
    qkv = launch.unit_stride(qkv)
    frames, height, width, _, heads, head_dim = qkv.shape
    windows = _windows(qkv, window)
    out = qkv.new_empty(frames, height, width, heads * head_dim)
    tensors, sizes = (qkv, *qkv.stride()[:-1], bias, out), (height, width, shift)
    constants = _constants(qkv, window, shift)
    if _is_one_tile(qkv, window):
        launch.run(
            _window_attention_fwd_kernel,
            lambda config: (heads * triton.cdiv(windows, config["RUN"]),),
            *(*tensors, *sizes, windows, scale),
            candidates=_whole(qkv, window),
            **constants,
        )
    else:
        launch.run(
            _window_attention_blocks_fwd_kernel,
            lambda config: (heads * windows,),
            *(*tensors, *sizes, scale),
            candidates=_blocks(qkv),
            **constants,
        )
    return out


def window_attention_bwd(grad: Tensor, qkv: Tensor, bias: Tensor, window: int, shift: int, scale: float) -> Tensor:
    """Gradient of ``qkv``, contiguous, from that of the output."""
    assert bias.is_contiguous()
    grad, qkv = launch.unit_stride(grad), launch.unit_stride(qkv)
    _, height, width, _, heads, _ = qkv.shape
    windows = _windows(qkv, window)
    dqkv = qkv.new_empty(qkv.shape)
    inputs, sizes = (grad, *grad.stride()[:-1], qkv, *qkv.stride()[:-1], bias), (height, width, shift)
    constants = _constants(qkv, window, shift)
    if _is_one_tile(qkv, window):
        launch.run(
            _window_attention_bwd_kernel,
            lambda config: (heads * triton.cdiv(windows, config["RUN"]),),
            *(*inputs, dqkv, *sizes, windows, scale),
            candidates=_whole(qkv, window),
            **constants,
        )
    else:
        stats = qkv.new_empty(windows, heads, 2, window**2, dtype=torch.float32)
        launch.run(
            _window_attention_blocks_bwd_kernel,
            lambda config: (heads * windows,),
            *(*inputs, stats, dqkv, *sizes, scale),
            candidates=_blocks(qkv),
            **constants,
        )
    return dqkv
