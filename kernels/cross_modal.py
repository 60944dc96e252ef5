"""The parameter-free two-way cross-attention that never writes its scores. Card: docs/ops/cross_modal.md.

G groups (frames, or windows of all frames), n and m tokens of a group, r rank in tiles of RA + RB. The problem is symmetric:
a program owns rows of one stream and loops over the tokens of the other, and which stream owns is the only difference.
Scores are kept in units of log 2. Hidden tokens are packed rows ``[G * n, r]``, or in the window form ``[F * H * W, r]`` in the
layout of the image, where a window's rows are found by index arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import dot_ranks, dot_split, load_split, row_block, store_split, zeros_split


@triton.jit
def token_rows(
    group, o_t, tokens, height, width, shift, SIZE: tl.constexpr
):  # fmt: skip
    """Where the tokens ``o_t`` of a group lie: the row of their frame (64 bits), and their rows from there on.

    A group is a frame (SIZE 0), or a window of a frame after the cyclic roll by -shift.
    """
    if SIZE == 0:
        first = group * tokens
        rows = o_t
    else:
        across = width // SIZE
        windows = height // SIZE * across
        window = (group % windows).to(tl.int32)
        # Rolling comes down to one wrap round at the border.
        y = window // across * SIZE + shift + o_t // SIZE
        x = window % across * SIZE + shift + o_t % SIZE
        y -= tl.where(y >= height, height, 0)
        x -= tl.where(x >= width, width, 0)
        first = group // windows * (height * width)
        rows = y * width + x
    return first, rows


@triton.jit
def attend(
    own_a,  # [BLOCK_N, RA]
    own_b,  # [BLOCK_N, RB]
    other,  # [G * m, R]
    group,
    tokens,
    height,
    width,
    shift,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What rows of one stream hear, ``softmax(own other^T) other`` as two float32 tiles, and their scores' log-sum-exp."""
    LOG2E: tl.constexpr = 1.4426950408889634
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc_a, acc_b = zeros_split(BLOCK_N, RA, RB)
    for start in range(0, tokens, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < tokens
        first, rows = token_rows(group, o_m, tokens, height, width, shift, SIZE)
        k_a, k_b = load_split(other + first * R, rows, m_m, R, RA, RB, DTYPE)
        scores = dot_ranks(own_a, own_b, k_a, k_b, RB, PRECISION) * LOG2E
        scores = tl.where(m_m[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc_a *= shrink[:, None]
        if RB > 0:
            acc_b *= shrink[:, None]
        acc_a, acc_b = dot_split(p.to(DTYPE), k_a, k_b, acc_a, acc_b, RB, PRECISION)
        peak = higher
    acc_a /= total[:, None]
    if RB > 0:
        acc_b /= total[:, None]
    return acc_a, acc_b, peak + tl.log2(total)


@triton.jit
def _cross_modal_fwd_tile(
    own,  # [G * n, R]
    other,  # [G * m, R]
    gate,  # [1]
    out,  # [G * n, R]
    heard,  # [G * n, R]
    lse,  # [G * n]
    tokens,
    other_tokens,
    tile,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_N)
    group = (tile // tiles).to(tl.int64)
    o_n = (tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < tokens
    first = group * tokens
    own_a, own_b = load_split(own + first * R, o_n, m_n, R, RA, RB, tl.float32)
    heard_a, heard_b, b_lse = attend(
        own_a.to(DTYPE), own_b.to(DTYPE), other, group, other_tokens, 0, 0, 0, R, RA, RB, 0, DTYPE, PRECISION, BLOCK_N, BLOCK_M
    )  # fmt: skip
    store_split(heard + first * R, o_n, m_n, heard_a, heard_b, R, RA, RB)
    tl.store(lse + first + o_n, b_lse, mask=m_n)
    b_gate = tl.load(gate).to(tl.float32)
    store_split(out + first * R, o_n, m_n, own_a + b_gate * heard_a, own_b + b_gate * heard_b, R, RA, RB)


@triton.jit(do_not_specialize=["groups", "tokens_visual", "tokens_audio"])
def _cross_modal_fwd_kernel(
    visual, audio, gate_visual, gate_audio, out_visual, out_audio, heard_visual, heard_audio, lse_visual, lse_audio, groups,
    tokens_visual, tokens_audio, R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, TO_VISUAL: tl.constexpr, TO_AUDIO:
    tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first = groups * tl.cdiv(tokens_visual, BLOCK_N) if TO_VISUAL else 0
    if TO_VISUAL and (not TO_AUDIO or tile < first):
        _cross_modal_fwd_tile(
            visual, audio, gate_visual, out_visual, heard_visual, lse_visual, tokens_visual, tokens_audio, tile, R, RA, RB,
            DTYPE, PRECISION, BLOCK_N, BLOCK_M,
        )  # fmt: skip
    else:
        _cross_modal_fwd_tile(
            audio, visual, gate_audio, out_audio, heard_audio, lse_audio, tokens_audio, tokens_visual, tile - first, R, RA, RB,
            DTYPE, PRECISION, BLOCK_N, BLOCK_M,
        )  # fmt: skip


@triton.jit
def _cross_modal_bwd_group(
    own,  # [G * n, R]
    other,  # [G * m, R]
    own_grad,  # [G * n, R]
    other_grad,  # [G * m, R]
    own_gate,  # [1]
    other_gate,  # [1]
    own_lse,  # [G * n]
    other_lse,  # [G * m]
    own_delta,  # [G * n]
    other_delta,  # [G * m]
    d_own,  # [G * n, R]
    group,
    tokens,
    other_tokens,
    height,
    width,
    shift,
    o_t,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    TO_OWN: tl.constexpr,
    TO_OTHER: tl.constexpr,
    SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    b_own_gate, b_other_gate = tl.load(own_gate).to(tl.float32), tl.load(other_gate).to(tl.float32)
    m_n = o_t < tokens
    first, o_n = token_rows(group, o_t, tokens, height, width, shift, SIZE)
    own_a, own_b = load_split(own + first * R, o_n, m_n, R, RA, RB, DTYPE)
    grad_a, grad_b = load_split(own_grad + first * R, o_n, m_n, R, RA, RB, DTYPE)
    if TO_OWN:
        b_own_lse = tl.load(own_lse + first + o_n, mask=m_n, other=0.0)
        b_own_delta = tl.load(own_delta + first + o_n, mask=m_n, other=0.0)
    acc_a, acc_b = zeros_split(BLOCK_N, RA, RB)
    for start in range(0, other_tokens, BLOCK_M):
        o_u = start + tl.arange(0, BLOCK_M)
        m_m = o_u < other_tokens
        other_first, o_m = token_rows(group, o_u, other_tokens, height, width, shift, SIZE)
        other_a, other_b = load_split(other + other_first * R, o_m, m_m, R, RA, RB, DTYPE)
        # One tile of scores serves both softmaxes; exp2 gives 0 beyond the last token.
        scores = tl.where(m_m[None, :], dot_ranks(own_a, own_b, other_a, other_b, RB, PRECISION) * LOG2E, float("-inf"))
        d_scores = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if TO_OWN:
            p = tl.exp2(scores - b_own_lse[:, None])
            d_scores += b_own_gate * p * (dot_ranks(grad_a, grad_b, other_a, other_b, RB, PRECISION) - b_own_delta[:, None])
        if TO_OTHER:
            other_grad_a, other_grad_b = load_split(other_grad + other_first * R, o_m, m_m, R, RA, RB, DTYPE)
            b_other_lse = tl.load(other_lse + other_first + o_m, mask=m_m, other=0.0)
            b_other_delta = tl.load(other_delta + other_first + o_m, mask=m_m, other=0.0)
            q = b_other_gate * tl.exp2(scores - b_other_lse[None, :])
            d_scores += q * (dot_ranks(own_a, own_b, other_grad_a, other_grad_b, RB, PRECISION) - b_other_delta[None, :])
            acc_a, acc_b = dot_split(q.to(DTYPE), other_grad_a, other_grad_b, acc_a, acc_b, RB, PRECISION)
        acc_a, acc_b = dot_split(d_scores.to(DTYPE), other_a, other_b, acc_a, acc_b, RB, PRECISION)
    # Read again rather than held in registers during the loop, and unrounded.
    direct_a, direct_b = load_split(own_grad + first * R, o_n, m_n, R, RA, RB, tl.float32)
    store_split(d_own + first * R, o_n, m_n, acc_a + direct_a, acc_b + direct_b, R, RA, RB)


@triton.jit
def _cross_modal_bwd_tile(
    own,  # [G * n, R]
    other,  # [G * m, R]
    own_grad,  # [G * n, R]
    other_grad,  # [G * m, R]
    own_gate,  # [1]
    other_gate,  # [1]
    own_lse,  # [G * n]
    other_lse,  # [G * m]
    own_delta,  # [G * n]
    other_delta,  # [G * m]
    d_own,  # [G * n, R]
    groups,
    tokens,
    other_tokens,
    height,
    width,
    shift,
    tile,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    TO_OWN: tl.constexpr,
    TO_OTHER: tl.constexpr,
    SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_N)
    o_t = (tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    lead = (tile // tiles).to(tl.int64) * GROUPS
    if GROUPS == 1:
        _cross_modal_bwd_group(
            own, other, own_grad, other_grad, own_gate, other_gate, own_lse, other_lse, own_delta, other_delta, d_own, lead,
            tokens, other_tokens, height, width, shift, o_t, R, RA, RB, TO_OWN, TO_OTHER, SIZE, DTYPE, PRECISION, BLOCK_N,
            BLOCK_M,
        )  # fmt: skip
    else:
        # What the compiler would take out of this loop it would have to hold in registers, of which there are none left.
        for i in tl.range(0, tl.minimum(groups - lead, GROUPS), disable_licm=True):
            _cross_modal_bwd_group(
                own, other, own_grad, other_grad, own_gate, other_gate, own_lse, other_lse, own_delta, other_delta, d_own, lead
                + i, tokens, other_tokens, height, width, shift, o_t, R, RA, RB, TO_OWN, TO_OTHER, SIZE, DTYPE, PRECISION,
                BLOCK_N, BLOCK_M,
            )  # fmt: skip


@triton.jit(do_not_specialize=["groups", "tokens_visual", "tokens_audio", "height", "width", "shift"])
def _cross_modal_bwd_kernel(
    visual, audio, grad_visual, grad_audio, gate_visual, gate_audio, lse_visual, lse_audio, delta_visual, delta_audio, d_visual,
    d_audio, groups, tokens_visual, tokens_audio, height, width, shift, R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr,
    TO_VISUAL: tl.constexpr, TO_AUDIO: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N:
    tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first = tl.cdiv(groups, GROUPS) * tl.cdiv(tokens_visual, BLOCK_N)
    if tile < first:
        _cross_modal_bwd_tile(
            visual, audio, grad_visual, grad_audio, gate_visual, gate_audio, lse_visual, lse_audio, delta_visual, delta_audio,
            d_visual, groups, tokens_visual, tokens_audio, height, width, shift, tile, R, RA, RB, TO_VISUAL, TO_AUDIO, SIZE,
            DTYPE, PRECISION, BLOCK_N, BLOCK_M, GROUPS,
        )  # fmt: skip
    else:
        _cross_modal_bwd_tile(
            audio, visual, grad_audio, grad_visual, gate_audio, gate_visual, lse_audio, lse_visual, delta_audio, delta_visual,
            d_audio, groups, tokens_audio, tokens_visual, height, width, shift, tile - first, R, RA, RB, TO_AUDIO, TO_VISUAL,
            SIZE, DTYPE, PRECISION, BLOCK_N, BLOCK_M, GROUPS,
        )  # fmt: skip


@triton.jit
def _delta_tile(
    grad, heard, delta, rows, tile, R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    first, o_n, m_n = row_block(tile, rows, BLOCK_N)
    g_a, g_b = load_split(grad + first * R, o_n, m_n, R, RA, RB, tl.float32)
    h_a, h_b = load_split(heard + first * R, o_n, m_n, R, RA, RB, tl.float32)
    tl.store(delta + first + o_n, delta_of(g_a, g_b, h_a, h_b, RB), mask=m_n)


@triton.jit
def delta_of(g_a, g_b, h_a, h_b, RB: tl.constexpr):
    """The dot product of each row's gradient with what the row heard."""
    delta = tl.sum(g_a * h_a, 1)
    if RB > 0:
        delta += tl.sum(g_b * h_b, 1)
    return delta


@triton.jit(do_not_specialize=["rows_visual", "rows_audio"])
def _cross_modal_bwd_delta_kernel(
    grad_visual,  # [G * n, R]
    grad_audio,  # [G * m, R]
    heard_visual,  # [G * n, R]
    heard_audio,  # [G * m, R]
    delta_visual,  # [G * n]
    delta_audio,  # [G * m]
    rows_visual,
    rows_audio,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    TO_VISUAL: tl.constexpr,
    TO_AUDIO: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    first = tl.cdiv(rows_visual, BLOCK_N) if TO_VISUAL else 0
    if TO_VISUAL and (not TO_AUDIO or tile < first):
        _delta_tile(grad_visual, heard_visual, delta_visual, rows_visual, tile, R, RA, RB, BLOCK_N)
    else:
        _delta_tile(grad_audio, heard_audio, delta_audio, rows_audio, tile - first, R, RA, RB, BLOCK_N)


def tile_candidates(x: Tensor, dtype: torch.dtype, tokens: int, *, backward: bool) -> list[launch.Config]:
    """Blocks of own rows (BLOCK_N) and of the other stream's (BLOCK_M), by products' dtype, rank, card and tokens of a group.

    The defaults are the widest tiles that compile without spilled registers, and of those the ones of which more fit on a
    multiprocessor.
    """

    def configs(*sizes: tuple[int, int, int, int]) -> list[launch.Config]:
        return [{"BLOCK_N": n, "BLOCK_M": m, "num_warps": warps, "num_stages": stages} for n, m, warps, stages in sizes]

    if dtype == torch.float32:
        return configs((32, 32, 8, 1), (16, 32, 8, 1))
    windows, wide = tokens <= 64, x.shape[-1] > 96
    if launch.capability(x)[0] in (8, 12):
        # Here operands share the registers with the accumulators.
        if backward:
            return configs((32, 16, 4, 2), (16, 32, 4, 2), (32, 32, 4, 2))
        return configs((64, 64, 8, 2), (64, 32, 8, 2)) if wide else configs((64, 32, 4, 2), (128, 64, 8, 2))
    if windows and backward:
        return configs((32, 32, 4, 2), (32, 32, 8, 2)) if wide else configs((64, 32, 4, 1), (64, 32, 4, 2))
    if windows:
        return configs((64, 64, 8, 1)) if wide else configs((64, 32, 4, 1), (64, 64, 4, 1))
    if backward:
        return configs((64, 32, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2))
    return configs((64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2))


def listening(fusion: str) -> tuple[bool, bool]:
    """Whether vision hears audio, and audio vision."""
    return fusion in ("both", "a2v"), fusion in ("both", "v2a")


def _like(x: Tensor, wanted: bool, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape if wanted else 0, dtype=dtype)


def _wide(x: Tensor, gate: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, gate.dtype), dtype)


def _sums(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape[:-1] if wanted else 0, dtype=torch.float32)


def cross_modal_fwd(
    visual: Tensor, audio: Tensor, gate_visual: Tensor, gate_audio: Tensor, fusion: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs ``[G, n, r]`` and ``[G, m, r]``, what was heard of the same shapes, and log-sum-exps ``[G, n]`` and ``[G, m]``.

    Products run in ``dtype``, and what was heard is kept in it. All are empty for a stream that does not listen; one of the
    two does.
    """
    visual, audio = visual.contiguous(), audio.contiguous()
    to_visual, to_audio = listening(fusion)
    outs = _like(visual, to_visual, _wide(visual, gate_visual, dtype)), _like(audio, to_audio, _wide(audio, gate_audio, dtype))
    heards = _like(visual, to_visual, dtype), _like(audio, to_audio, dtype)
    lses = _sums(visual, to_visual), _sums(audio, to_audio)
    groups, n, rank = visual.shape
    m = audio.shape[1]
    launch.run(
        _cross_modal_fwd_kernel,
        lambda config: (
            groups * (to_visual * triton.cdiv(n, config["BLOCK_N"]) + to_audio * triton.cdiv(m, config["BLOCK_N"])),
        ),
        *(visual, audio, gate_visual, gate_audio, *outs, *heards, *lses, groups, n, m),
        candidates=tile_candidates(visual, dtype, max(n, m), backward=False),
        **launch.split_rank(rank),
        TO_VISUAL=to_visual,
        TO_AUDIO=to_audio,
        DTYPE=launch.triton_dtype(dtype),
        PRECISION=launch.precision(dtype),
    )
    return *outs, *heards, *lses


def cross_modal_bwd(
    grad_visual: Tensor,
    grad_audio: Tensor,
    visual: Tensor,
    audio: Tensor,
    gate_visual: Tensor,
    gate_audio: Tensor,
    heard_visual: Tensor,
    heard_audio: Tensor,
    lse_visual: Tensor,
    lse_audio: Tensor,
    fusion: str,
    needs_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both streams (empty unless needed), and of each token's share in the gates, ``[G, n]`` and ``[G, m]``."""
    to_visual, to_audio = listening(fusion)
    visual, audio, grad_visual, grad_audio = (x.contiguous() for x in (visual, audio, grad_visual, grad_audio))
    deltas = _sums(visual, to_visual), _sums(audio, to_audio)
    rows = visual.shape[:2].numel(), audio.shape[:2].numel()
    constants = {**launch.split_rank(visual.shape[2]), "TO_VISUAL": to_visual, "TO_AUDIO": to_audio}
    launch.run(
        _cross_modal_bwd_delta_kernel,
        lambda config: (
            to_visual * triton.cdiv(rows[0], config["BLOCK_N"]) + to_audio * triton.cdiv(rows[1], config["BLOCK_N"]),
        ),
        *(grad_visual, grad_audio, heard_visual, heard_audio, *deltas, *rows),
        candidates=[{"BLOCK_N": 64, "num_warps": 4, "num_stages": 1}],
        **constants,
    )
    d_visual, d_audio = _like(visual, needs_tokens), _like(audio, needs_tokens)
    if needs_tokens:
        attend_bwd(
            (visual, audio), (grad_visual, grad_audio), (gate_visual, gate_audio), (lse_visual, lse_audio), deltas, (d_visual,
            d_audio), visual.shape[0], visual.shape[1], audio.shape[1], (0, 0, 0, 0), fusion, heard_visual.dtype,
        )  # fmt: skip
    return d_visual, d_audio, *deltas


def attend_bwd(
    hiddens: Sequence[Tensor],
    grads: Sequence[Tensor],
    gates: Sequence[Tensor],
    lses: Sequence[Tensor],
    deltas: Sequence[Tensor],
    d_hiddens: Sequence[Tensor],
    groups: int,
    n: int,
    m: int,
    window: Sequence[int],
    fusion: str,
    dtype: torch.dtype,
) -> None:
    """Fill the gradients of both streams' hidden tokens. Pairs are visual, then audio; ``window`` is a WindowGrid or zeros."""
    to_visual, to_audio = listening(fusion)
    height, width, size, shift = window
    # Windows are short, so a program takes several of them one after another.
    together = 4 if size else 1
    launch.run(
        _cross_modal_bwd_kernel,
        lambda config: (
            triton.cdiv(groups, config["GROUPS"]) * (triton.cdiv(n, config["BLOCK_N"]) + triton.cdiv(m, config["BLOCK_N"])),
        ),
        *(*hiddens, *grads, *gates, *lses, *deltas, *d_hiddens, groups, n, m, height, width, shift),
        candidates=[{**c, "GROUPS": together} for c in tile_candidates(hiddens[0], dtype, max(n, m), backward=True)],
        **launch.split_rank(hiddens[0].shape[-1]),
        TO_VISUAL=to_visual,
        TO_AUDIO=to_audio,
        SIZE=size,
        DTYPE=launch.triton_dtype(dtype),
        PRECISION=launch.precision(dtype),
    )
