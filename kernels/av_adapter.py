"""The AV-adapter: down, exchange, up and both residual sums in two launches. Card: docs/ops/av_adapter.md.

F frames, n and m tokens of a frame, D channels, r rank in tiles of RA + RB; tokens are rows ``[F * n, D]``. Groups of the
exchange are frames or windows; a stream that does not listen only goes up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .adapter import contiguous, down_bwd, ends, expand, preactivation, row_candidates, row_grid, strides, weight_grads
from .cross_modal import attend, attend_bwd, delta_of, listening, tile_candidates, token_rows
from .primitives import gelu, load_split, row_block, store_split, to_rank


@triton.jit
def _down_tile(
    x,  # [N, D]
    stride_x,
    down_weight,  # [R, D]
    down_bias,  # [R]
    hidden,  # [N, R]
    rows,
    tile,
    D,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first, o_n, m_n = row_block(tile, rows, BLOCK_N)
    z_a, z_b = preactivation(
        x + first * stride_x, stride_x, o_n, m_n, down_weight, down_bias, D, R, RA, RB, BLOCK_D, DTYPE, PRECISION
    )
    store_split(hidden + first * R, o_n, m_n, gelu(z_a), gelu(z_b), R, RA, RB)


@triton.jit(do_not_specialize=["rows0", "rows1"])
def _av_adapter_fwd_down_kernel(
    x0, x1, stride_x0, stride_x1, down_weight0, down_weight1, down_bias0, down_bias1, hidden0, hidden1, rows0, rows1, D, R:
    tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, BLOCK_N)
    if tile < tiles0:
        _down_tile(
            x0, stride_x0, down_weight0, down_bias0, hidden0, rows0, tile, D, R, RA, RB, DTYPE, PRECISION, BLOCK_N, BLOCK_D
        )  # fmt: skip
    else:
        _down_tile(
            x1, stride_x1, down_weight1, down_bias1, hidden1, rows1, tile - tiles0, D, R, RA, RB, DTYPE, PRECISION, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip


@triton.jit
def _av_adapter_fwd_tile(
    own,  # hidden tokens [F * n, R]
    other,  # [F * m, R]
    gate,  # [1]
    x,  # [F * n, D]
    stride_x,
    residual,  # [F * n, D]
    stride_r,
    up_weight,  # [D, R]
    up_bias,  # [D]
    out,  # [F * n, D]
    heard,  # [F * n, R]
    lse,  # [F * n]
    groups,
    tokens,
    other_tokens,
    height,
    width,
    shift,
    tile,
    D,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    LISTENS: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_N)
    o_t = (tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_t < tokens
    lead = (tile // tiles).to(tl.int64) * GROUPS
    for i in tl.range(0, tl.minimum(groups - lead, GROUPS), disable_licm=True):
        group = lead + i
        first, o_n = token_rows(group, o_t, tokens, height, width, shift, SIZE)
        h_a, h_b = load_split(own + first * R, o_n, m_n, R, RA, RB, DTYPE)
        if LISTENS:
            heard_a, heard_b, b_lse = attend(
                h_a, h_b, other, group, other_tokens, height, width, shift, R, RA, RB, SIZE, DTYPE, PRECISION, BLOCK_N, BLOCK_M
            )  # fmt: skip
            store_split(heard + first * R, o_n, m_n, heard_a, heard_b, R, RA, RB)
            tl.store(lse + first + o_n, b_lse, mask=m_n)
            b_gate = tl.load(gate).to(tl.float32)
            h_a = (h_a.to(tl.float32) + b_gate * heard_a).to(DTYPE)
            h_b = (h_b.to(tl.float32) + b_gate * heard_b).to(DTYPE)
        expand(
            h_a, h_b, o_n, m_n, up_weight, up_bias, x, x + first * stride_x, stride_x, residual + first * stride_r, stride_r,
            out + first * D, D, R, RA, RB, False, True, ADD_RESIDUAL, BLOCK_D, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["groups", "tokens0", "tokens1", "height", "width", "shift"])
def _av_adapter_fwd_kernel(
    hidden0, hidden1, gate0, gate1, x0, x1, stride_x0, stride_x1, residual0, residual1, stride_r0, stride_r1, up_weight0,
    up_weight1, up_bias0, up_bias1, out0, out1, heard0, heard1, lse0, lse1, groups, tokens0, tokens1, height, width, shift, D,
    R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, LISTENS0: tl.constexpr, LISTENS1: tl.constexpr, ADD_RESIDUAL0:
    tl.constexpr, ADD_RESIDUAL1: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N:
    tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first = tl.cdiv(groups, GROUPS) * tl.cdiv(tokens0, BLOCK_N)
    if tile < first:
        _av_adapter_fwd_tile(
            hidden0, hidden1, gate0, x0, stride_x0, residual0, stride_r0, up_weight0, up_bias0, out0, heard0, lse0, groups,
            tokens0, tokens1, height, width, shift, tile, D, R, RA, RB, LISTENS0, ADD_RESIDUAL0, SIZE, DTYPE, PRECISION,
            BLOCK_N, BLOCK_M, BLOCK_D, GROUPS,
        )  # fmt: skip
    else:
        _av_adapter_fwd_tile(
            hidden1, hidden0, gate1, x1, stride_x1, residual1, stride_r1, up_weight1, up_bias1, out1, heard1, lse1, groups,
            tokens1, tokens0, height, width, shift, tile - first, D, R, RA, RB, LISTENS1, ADD_RESIDUAL1, SIZE, DTYPE, PRECISION,
            BLOCK_N, BLOCK_M, BLOCK_D, GROUPS,
        )  # fmt: skip


@triton.jit
def _up_bwd_tile(
    grad,  # [N, D] of the output
    stride_g,
    up_weight,  # [D, R]
    hidden,  # [N, R]
    heard,  # [N, R]
    gate,  # [1]
    d_exchanged,  # [N, R]
    exchanged,  # [N, R], written where NEEDS_WEIGHTS
    delta,  # [N], written where LISTENS
    rows,
    tile,
    D,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    LISTENS: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first, o_n, m_n = row_block(tile, rows, BLOCK_N)
    g_a, g_b = to_rank(grad + first * stride_g, stride_g, o_n, m_n, up_weight, 1, R, D, R, RA, RB, BLOCK_D, DTYPE, PRECISION)
    store_split(d_exchanged + first * R, o_n, m_n, g_a, g_b, R, RA, RB)
    if LISTENS:
        # Of the rounded gradient, whose products with the scores' tiles it is compared with.
        heard_a, heard_b = load_split(heard + first * R, o_n, m_n, R, RA, RB, tl.float32)
        b_delta = delta_of(g_a.to(DTYPE).to(tl.float32), g_b.to(DTYPE).to(tl.float32), heard_a, heard_b, RB)
        tl.store(delta + first + o_n, b_delta, mask=m_n)
    if NEEDS_WEIGHTS:
        h_a, h_b = load_split(hidden + first * R, o_n, m_n, R, RA, RB, tl.float32)
        if LISTENS:
            b_gate = tl.load(gate).to(tl.float32)
            h_a += b_gate * heard_a
            if RB > 0:
                h_b += b_gate * heard_b
        store_split(exchanged + first * R, o_n, m_n, h_a, h_b, R, RA, RB)


@triton.jit(do_not_specialize=["rows0", "rows1"])
def _av_adapter_bwd_up_kernel(
    grad0, grad1, stride_g0, stride_g1, up_weight0, up_weight1, hidden0, hidden1, heard0, heard1, gate0, gate1, d_exchanged0,
    d_exchanged1, exchanged0, exchanged1, delta0, delta1, rows0, rows1, D, R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr,
    LISTENS0: tl.constexpr, LISTENS1: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, BLOCK_N)
    if tile < tiles0:
        _up_bwd_tile(
            grad0, stride_g0, up_weight0, hidden0, heard0, gate0, d_exchanged0, exchanged0, delta0, rows0, tile, D, R, RA, RB,
            LISTENS0, NEEDS_WEIGHTS, DTYPE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _up_bwd_tile(
            grad1, stride_g1, up_weight1, hidden1, heard1, gate1, d_exchanged1, exchanged1, delta1, rows1, tile - tiles0, D, R,
            RA, RB, LISTENS1, NEEDS_WEIGHTS, DTYPE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip


def _geometry(xs: Sequence[Tensor], window: Sequence[int]) -> tuple[int, int, int, tuple[int, int, int, int]]:
    """Groups, tokens of a visual and of an audio group, and the window grid (zeros for whole frames)."""
    frames, n, _ = xs[0].shape
    if not window:
        return frames, n, xs[1].shape[1], (0, 0, 0, 0)
    height, width, size, shift = window
    return frames * (height // size) * (width // size), size * size, size * size, (height, width, size, shift)


def av_adapter_fwd(
    xs: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    up_biases: Sequence[Tensor],
    gates: Sequence[Tensor],
    window: Sequence[int],
    fusion: str,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Both streams' outputs ``[F, n, D]``, hidden tokens and what they heard ``[F, n, r]``, and log-sum-exps ``[F, n]``.

    Each argument is a pair, visual then audio. What a stream that does not listen would hear is empty. ``window`` is a
    WindowGrid, or empty for whole frames. Products run in ``dtype``, which outputs have too unless their sums are wider.
    """
    shapes = [x.shape for x in xs]
    groups, n, m, (height, width, size, shift) = _geometry(xs, window)
    rows = [launch.as_rows(x) for x in xs]
    added = [x if r is None else launch.as_rows(r) for x, r in zip(rows, residuals, strict=True)]
    down_weights, down_biases, up_weights, up_biases = contiguous(down_weights, down_biases, up_weights, up_biases)
    rank, channels = down_weights[0].shape
    listens = listening(fusion)
    wide = [torch.promote_types(torch.promote_types(x.dtype, r.dtype), dtype) for x, r in zip(rows, added, strict=True)]
    outs = [x.new_empty(shape, dtype=d) for x, shape, d in zip(xs, shapes, wide, strict=True)]
    hiddens = [x.new_empty(*shape[:2], rank, dtype=dtype) for x, shape in zip(xs, shapes, strict=True)]
    heards = [h.new_empty(h.shape if listen else 0) for h, listen in zip(hiddens, listens, strict=True)]
    lses = [h.new_empty(h.shape[:2] if listen else 0, dtype=torch.float32) for h, listen in zip(hiddens, listens, strict=True)]
    constants = {
        **launch.split_rank(rank),
        "DTYPE": launch.triton_dtype(dtype),
        "PRECISION": launch.precision(dtype),
    }
    launch.run(
        _av_adapter_fwd_down_kernel,
        row_grid(rows),
        *(*ends(rows), *strides(rows), *ends(down_weights), *ends(down_biases), *ends(hiddens)),
        *(len(rows[0]), len(rows[1]), channels),
        candidates=row_candidates(rows[0], dtype, rank),
        **constants,
    )
    # Windows are short, so a program takes several of them one after another.
    together = 4 if size else 1
    launch.run(
        _av_adapter_fwd_kernel,
        lambda config: (
            triton.cdiv(groups, config["GROUPS"]) * (triton.cdiv(n, config["BLOCK_N"]) + triton.cdiv(m, config["BLOCK_N"])),
        ),
        *(*ends(hiddens), *ends(gates), *ends(rows), *strides(rows), *ends(added), *strides(added)),
        *(*ends(up_weights), *ends(up_biases), *ends(outs), *ends(heards), *ends(lses), groups, n, m),
        *(height, width, shift, channels),
        candidates=[
            {**c, "BLOCK_D": block, "GROUPS": together}
            for block in ((32,) if dtype == torch.float32 else (32, 64) if size and rank <= 96 else (64, 32))
            for c in tile_candidates(hiddens[0], dtype, max(n, m), backward=False)
        ],
        **constants,
        LISTENS0=listens[0],
        LISTENS1=listens[1],
        ADD_RESIDUAL0=residuals[0] is not None,
        ADD_RESIDUAL1=residuals[1] is not None,
        SIZE=size,
    )
    return outs, hiddens, heards, lses


def av_adapter_bwd(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    gates: Sequence[Tensor],
    hiddens: Sequence[Tensor],
    heards: Sequence[Tensor],
    lses: Sequence[Tensor],
    window: Sequence[int],
    fusion: str,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of both inputs as packed rows ``[F * (n + m), D]``, visual then audio; those of the weights as `weight_grads`
    packs them; and each token's share in its gate.

    What is not needed is empty, as are the shares of a stream that does not listen.
    """
    dtype = hiddens[0].dtype
    groups, n, m, grid = _geometry(xs, window)
    rows, grads = [launch.as_rows(x) for x in xs], [launch.as_rows(g) for g in grads]
    down_weights, down_biases, up_weights = contiguous(down_weights, down_biases, up_weights)
    rank, channels = down_weights[0].shape
    listens = listening(fusion)
    d_hiddens = [torch.empty_like(h) for h in hiddens]
    exchanged = [h.new_empty(x.shape[0], rank) for h, x in zip(hiddens, rows, strict=True)] if needs_weights else []
    deltas = [torch.empty_like(lse) for lse in lses]
    launch.run(
        _av_adapter_bwd_up_kernel,
        row_grid(rows),
        *(*ends(grads), *strides(grads), *ends(up_weights), *ends(hiddens), *ends(heards), *ends(gates)),
        *(*ends(d_hiddens), *ends(exchanged or d_hiddens), *ends(deltas), len(rows[0]), len(rows[1]), channels),
        candidates=row_candidates(rows[0], dtype, rank),
        **launch.split_rank(rank),
        LISTENS0=listens[0],
        LISTENS1=listens[1],
        NEEDS_WEIGHTS=needs_weights,
        DTYPE=launch.triton_dtype(dtype),
        PRECISION=launch.precision(dtype),
    )
    if not (needs_x or needs_weights):
        return xs[0].new_empty(0, channels), [], deltas
    if any(listens):
        d_exchanged, d_hiddens = d_hiddens, [torch.empty_like(h) for h in hiddens]
        attend_bwd(hiddens, d_exchanged, gates, lses, deltas, d_hiddens, groups, n, m, grid, fusion, dtype)
    dx = xs[0].new_empty(sum(map(len, rows)) if needs_x else 0, channels)
    _, dzs = down_bwd(grads, rows, [], down_weights, down_biases, up_weights, d_hiddens, dx, needs_weights, dtype)
    packed = [weight_grads(grads, exchanged, [], down=False), weight_grads(rows, dzs, [], down=True)] if needs_weights else []
    return dx, packed, deltas
