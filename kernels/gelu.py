"""GELU, exact or in CLIP's quick form: one pass forward, one backward. Card: docs/ops/gelu.md.

N rows, D channels. A program owns BLOCK channels of one row; packed tensors are one long row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, primitives


@triton.jit
def _sigmoid(t):
    """``sigmoid(t)`` and ``sigmoid(t) sigmoid(-t)``: no exponential overflows, and 1 - sigmoid cancels nowhere."""
    b_e = tl.exp(-tl.abs(t))
    b_r = 1 / (1 + b_e)
    return tl.where(t >= 0, b_r, b_e * b_r), b_e * b_r * b_r


@triton.jit
def _place(D, BLOCK: tl.constexpr):
    """The program's row, its channels, and which of them there are."""
    # Not cdiv, whose sum overflows for the longest rows that 32 bits hold.
    tiles = (D - 1) // BLOCK + 1
    row = (tl.program_id(0) // tiles).to(tl.int64)
    o_d = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, o_d, o_d < D


@triton.jit
def _gelu_fwd_kernel(
    x,  # [N, D]
    stride_x,
    y,  # [N, D]
    D,
    QUICK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, o_d, m_d = _place(D, BLOCK)
    b_x = tl.load(x + row * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    if QUICK:
        b_s, _ = _sigmoid(1.702 * b_x)
        b_y = b_x * b_s
    else:
        b_y = primitives.gelu(b_x)
    tl.store(y + row * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


@triton.jit
def _gelu_bwd_kernel(
    grad,  # [N, D]
    stride_g,
    x,  # [N, D]
    stride_x,
    dx,  # [N, D]
    D,
    QUICK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, o_d, m_d = _place(D, BLOCK)
    b_x = tl.load(x + row * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_g = tl.load(grad + row * stride_g + o_d, mask=m_d, other=0.0).to(tl.float32)
    if QUICK:
        b_s, b_ds = _sigmoid(1.702 * b_x)
        b_dx = b_g * (b_s + 1.702 * b_x * b_ds)
    else:
        b_dx = b_g * primitives.gelu_grad(b_x)
    tl.store(dx + row * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_d)


# Of the default each thread reads 16 bytes of bfloat16 at once.
_CANDIDATES = [{"BLOCK": n, "num_warps": w, "num_stages": 1} for n, w in ((1024, 4), (2048, 4), (4096, 8), (512, 2))]


def _rows(*xs: Tensor) -> list[Tensor]:
    rows = [launch.as_rows(x) for x in xs]
    return [x.view(1, -1) for x in rows] if all(x.is_contiguous() for x in rows) else rows


def _grid(x: Tensor):
    return lambda config: (len(x) * triton.cdiv(x.shape[1], config["BLOCK"]),)


def gelu_fwd(x: Tensor, quick: bool) -> Tensor:
    """Packed output in the shape and dtype of ``x [..., D]``."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (rows,) = _rows(x)
    launch.run(
        _gelu_fwd_kernel,
        _grid(rows),
        *(rows, rows.stride(0), y, rows.shape[1]),
        candidates=_CANDIDATES,
        QUICK=quick,
    )
    return y


def gelu_bwd(grad: Tensor, x: Tensor, quick: bool) -> Tensor:
    """Packed gradient of ``x [..., D]`` from that of the output."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grads, rows = _rows(grad, x)
    launch.run(
        _gelu_bwd_kernel,
        _grid(rows),
        *(grads, grads.stride(0), rows, rows.stride(0), dx, rows.shape[1]),
        candidates=_CANDIDATES,
        QUICK=quick,
    )
    return dx
