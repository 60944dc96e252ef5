"""Attention over time at each token position. Card: docs/ops/temporal_attention.md.

B clips, T frames, S sites of a frame, h heads, d channels of a head. A tile is BLOCK rows: BLOCK // T neighbouring sites of
one head, all frames of each. Its scores are one product, of which the blocks on the diagonal count. Sites are dealt out to R
slots, site n to slot n mod R; a program owns the slots of a tile and passes over their sites, so that the bias stays in
registers and the gradient to the bias is summed there, over the sites in the same order whatever BLOCK is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import dot

# Rows of all heads that are under way at a time: 16 for each of 31 warps on each of 132 multiprocessors.
ROWS = 65536


@triton.jit
def _load(x, o_r, m_r, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(x + o_r[:, None] + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _store(x, o_r, m_r, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    tl.store(x + o_r[:, None] + o_d[None, :], b_x.to(x.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit
def _offset(
    bias,  # [h, T, T]
    stride_h,
    stride_q,
    stride_k,
    head,
    T: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is added to a tile's scores, in units of log 2: the bias within a site, minus infinity between sites."""
    o_g, o_t = tl.arange(0, BLOCK) // T, (tl.arange(0, BLOCK) % T).to(tl.int64)
    # The rows that are left over when T does not divide BLOCK are a site of zeros, which nobody stores.
    m = o_g[:, None] == o_g[None, :]
    b_offset = tl.where(m, 0.0, float("-inf"))
    if BIAS:
        p_bias = bias + head * stride_h + o_t[:, None] * stride_q + o_t[None, :] * stride_k
        b_bias = tl.load(p_bias, mask=m, other=0.0).to(tl.float32)
        b_offset = tl.where(m, b_bias * 1.4426950408889634, float("-inf"))
    return b_offset


@triton.jit
def _exponentials(b_scores, b_offset, scale):
    """Exponentials of a tile's scores and their sums over the rows."""
    b_s = b_scores * (scale * 1.4426950408889634) + b_offset
    b_e = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    return b_e, tl.sum(b_e, 1)


@triton.jit(do_not_specialize=["heads", "S", "sites", "slots"])
def _temporal_attention_fwd_kernel(
    qkv,  # [B, T, S, 3, h, d]
    stride_b,
    stride_t,
    stride_s,
    stride_3,
    stride_h,
    bias,  # [h, T, T]
    stride_bias_h,
    stride_bias_q,
    stride_bias_k,
    out,  # [B, T, S, h * d]
    scale,
    heads,
    S,
    sites,  # B * S
    slots,  # R
    T: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Neighbouring programs take neighbouring heads, which share cache lines.
    head = (tl.program_id(0) % heads).to(tl.int64)
    o_r = tl.arange(0, BLOCK)
    o_t = (o_r % T).to(tl.int64)
    o_slot = tl.program_id(0) // heads * (BLOCK // T) + o_r // T
    m_slot = (o_r // T < BLOCK // T) & (o_slot < slots)
    b_offset = _offset(bias, stride_bias_h, stride_bias_q, stride_bias_k, head, T, BIAS, BLOCK)
    for first in range(0, sites, slots):
        o_site = first + o_slot
        m_r = m_slot & (o_site < sites)
        o_b, o_s = (o_site // S).to(tl.int64), (o_site % S).to(tl.int64)
        o_q = o_b * stride_b + o_t * stride_t + o_s * stride_s + head * stride_h
        o_k = o_q + stride_3
        o_v = o_k + stride_3
        o_out = ((o_b * T + o_t) * S + o_s) * (heads * D) + head * D

        b_q, b_k = _load(qkv, o_q, m_r, D, BLOCK_D), _load(qkv, o_k, m_r, D, BLOCK_D)
        b_v = _load(qkv, o_v, m_r, D, BLOCK_D)
        b_scores = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
        b_e, b_sum = _exponentials(b_scores, b_offset, scale)
        b_o = dot(b_e.to(b_v.dtype), b_v, tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION)
        _store(out, o_out, m_r, b_o / b_sum[:, None], D, BLOCK_D)


@triton.jit(do_not_specialize=["heads", "S", "sites", "slots"])
def _temporal_attention_bwd_kernel(
    grad,  # [B, T, S, h * d]
    stride_gb,
    stride_gt,
    stride_gs,
    qkv,  # [B, T, S, 3, h, d]
    stride_b,
    stride_t,
    stride_s,
    stride_3,
    stride_h,
    bias,  # [h, T, T]
    stride_bias_h,
    stride_bias_q,
    stride_bias_k,
    dqkv,  # [B, T, S, 3, h, d]
    dbias,  # [h, R, T, T]
    scale,
    heads,
    S,
    sites,  # B * S
    slots,  # R
    T: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    QKV_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    o_r = tl.arange(0, BLOCK)
    o_t = (o_r % T).to(tl.int64)
    o_slot = tl.program_id(0) // heads * (BLOCK // T) + o_r // T
    m_slot = (o_r // T < BLOCK // T) & (o_slot < slots)
    # Larger tiles leave no registers for the bias and read it again for every tile.
    if BLOCK <= 32:
        b_offset = _offset(bias, stride_bias_h, stride_bias_q, stride_bias_k, head, T, BIAS, BLOCK)
    b_dbias = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, sites, slots):
        o_site = first + o_slot
        m_r = m_slot & (o_site < sites)
        o_b, o_s = (o_site // S).to(tl.int64), (o_site % S).to(tl.int64)
        o_g = o_b * stride_gb + o_t * stride_gt + o_s * stride_gs + head * D
        o_q = o_b * stride_b + o_t * stride_t + o_s * stride_s + head * stride_h
        o_k = o_q + stride_3
        o_v = o_k + stride_3

        b_q, b_k = _load(qkv, o_q, m_r, D, BLOCK_D), _load(qkv, o_k, m_r, D, BLOCK_D)
        b_v, b_g = _load(qkv, o_v, m_r, D, BLOCK_D), _load(grad, o_g, m_r, D, BLOCK_D)
        b_scores = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
        if BLOCK > 32:
            b_offset = _offset(bias, stride_bias_h, stride_bias_q, stride_bias_k, head, T, BIAS, BLOCK)
        b_e, b_sum = _exponentials(b_scores, b_offset, scale)
        b_p = b_e / b_sum[:, None]
        b_dp = dot(b_g, tl.trans(b_v), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
        if BIAS_GRAD:
            # Rows without a site have a gradient of zero.
            b_dbias += b_ds
        if QKV_GRAD:
            o_dq = ((o_b * T + o_t) * S + o_s) * (3 * heads * D) + head * D
            o_dk, o_dv = o_dq + heads * D, o_dq + 2 * heads * D
            b_p, b_ds = b_p.to(b_g.dtype), b_ds.to(b_q.dtype)
            b_zero = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            _store(dqkv, o_dv, m_r, dot(tl.trans(b_p), b_g, b_zero, PRECISION), D, BLOCK_D)
            _store(dqkv, o_dq, m_r, dot(b_ds, b_k, b_zero, PRECISION) * scale, D, BLOCK_D)
            _store(dqkv, o_dk, m_r, dot(tl.trans(b_ds), b_q, b_zero, PRECISION) * scale, D, BLOCK_D)
    if BIAS_GRAD:
        m = (o_r // T)[:, None] == (o_r // T)[None, :]
        p_dbias = dbias + (head * slots + o_slot[:, None]) * (T * T) + o_t[:, None] * T + o_t[None, :]
        tl.store(p_dbias, b_dbias, mask=m & m_slot[:, None])


def _roomy(qkv: Tensor) -> bool:
    """Whether the GPU has the shared memory and the warp-group products of a data-centre card from Hopper on."""
    return (9, 0) <= launch.capability(qkv) < (12, 0)


def _candidates(qkv: Tensor) -> list[launch.Config]:
    frames, width = qkv.shape[1], _width(qkv)
    if qkv.dtype == torch.float32:
        # Exact products run outside the tensor cores: a small tile, and many threads to hold it.
        return [{"BLOCK": max(16, triton.next_power_of_2(frames)), "num_warps": 4, "num_stages": 1}]
    if frames > 32:
        return [{"BLOCK": 64, "num_warps": 8, "num_stages": 2 if _roomy(qkv) else 1}]
    # Scores between sites are thrown away, so a tile is no larger than it takes to fill most of its rows.
    candidates = [{"BLOCK": 32, "num_warps": 2 if width <= 32 else 4, "num_stages": s} for s in (2, 1)]
    return [*candidates, {"BLOCK": 16, "num_warps": 1, "num_stages": 1}] if frames <= 16 else candidates


def _width(qkv: Tensor) -> int:
    width = max(16, triton.next_power_of_2(qkv.shape[5]))
    # Warps share out 64 rows of 128 channels, but each of them repeats parts of 64 x 64, and spills.
    return 128 if qkv.shape[1] > 32 and width == 64 and not _roomy(qkv) else width


def _slots(sites: int, heads: int, frames: int) -> int:
    """R of the module's docstring: it depends on nothing but the shape, so that sums do not either."""
    rounds = max(1, triton.cdiv(sites * heads * frames, ROWS))
    return triton.cdiv(sites, rounds)


def _constants(qkv: Tensor, bias: Tensor | None) -> dict[str, object]:
    return {
        "T": qkv.shape[1],
        "D": qkv.shape[5],
        "BLOCK_D": _width(qkv),
        "BIAS": bias is not None,
        "PRECISION": launch.precision(qkv.dtype),
    }


def _grid(heads: int, frames: int, slots: int):
    return lambda config: (heads * triton.cdiv(slots, config["BLOCK"] // frames),)


def _addressed(bias: Tensor | None, qkv: Tensor) -> tuple[Tensor, int, int, int]:
    """The bias and its strides; without one, something in its place that is not read."""
    return (qkv, 0, 0, 0) if bias is None else (bias, *bias.stride())


def temporal_attention_fwd(qkvs: Sequence[Tensor], biases: Sequence[Tensor | None], scale: float) -> list[Tensor]:
    """``softmax(scale q k^T + bias) v`` of each stream: ``[B, T, S, 3, h, d]`` and ``[h, T, T]`` to ``[B, T, S, h * d]``."""
    outs = []
    for qkv, bias in zip(qkvs, biases, strict=True):
        qkv = launch.unit_stride(qkv)
        batch, frames, sites, _, heads, head_dim = qkv.shape
        outs.append(qkv.new_empty(batch, frames, sites, heads * head_dim))
        slots = _slots(batch * sites, heads, frames)
        launch.run(
            _temporal_attention_fwd_kernel,
            _grid(heads, frames, slots),
            *(qkv, *qkv.stride()[:5]),
            *_addressed(bias, qkv),
            *(outs[-1], scale, heads, sites, batch * sites, slots),
            candidates=_candidates(qkv),
            **_constants(qkv, bias),
        )
    return outs


def temporal_attention_bwd(
    grads: Sequence[Tensor],
    qkvs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scale: float,
    qkv_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of all qkv as packed rows ``[rows, 3, h, d]``, one stream behind the other, and of the biases.

    What is not asked for is empty.
    """
    first = qkvs[0]
    packed = first.new_empty(sum(x.shape[:3].numel() for x in qkvs) if qkv_grad else 0, *first.shape[3:])
    dbiases, start = [], 0
    for grad, qkv, bias in zip(grads, qkvs, biases, strict=True):
        grad, qkv = launch.unit_stride(grad), launch.unit_stride(qkv)
        batch, frames, sites, _, heads, _ = qkv.shape
        slots = _slots(batch * sites, heads, frames)
        # What is not asked for is not written either.
        dqkv = packed[start : start + batch * frames * sites] if qkv_grad else qkv
        dbias = qkv.new_empty(heads, slots, frames, frames, dtype=torch.float32) if bias_grad else qkv
        launch.run(
            _temporal_attention_bwd_kernel,
            _grid(heads, frames, slots),
            *(grad, *grad.stride()[:3]),
            *(qkv, *qkv.stride()[:5]),
            *_addressed(bias, qkv),
            *(dqkv, dbias, scale, heads, sites, batch * sites, slots),
            candidates=_candidates(qkv),
            **_constants(qkv, bias),
            QKV_GRAD=qkv_grad,
            BIAS_GRAD=bias_grad,
        )
        start += batch * frames * sites
        if bias_grad:
            dbiases.append(dbias.sum(1).to(bias.dtype))
    return packed, dbiases
