"""Device functions that two or more operators share."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` with sums in float32. "upcast" is for the interpreter: the product of bfloat16 is exact in float32."""
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def row_block(tile, rows, BLOCK_N: tl.constexpr):
    """First row of a block (64 bits), its rows from there on (32 bits), and which of them there are.

    Pointers advance by the first row once, so that the tiles' own offsets need a register each, not two.
    """
    first = tile.to(tl.int64) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    return first, o_n, o_n < rows - first


@triton.jit
def gelu(z):
    """Exact GELU in float32."""
    return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_grad(z):
    """Derivative of the exact GELU in float32."""
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


# A rank r that is no power of two is held as two tiles of RA and RB channels, 96 as 64 + 32, not padded to the next power.
# Where RB is 0 the second tile stands for nothing: it is never read, and the compiler drops it.


@triton.jit
def load_split(x, o_n, m_n, R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, DTYPE: tl.constexpr):
    """Rows ``o_n`` of the packed ``x [N, R]`` as two tiles, rounded to DTYPE."""
    o_a = tl.arange(0, RA)
    b_a = tl.load(x + o_n[:, None] * R + o_a[None, :], mask=m_n[:, None] & (o_a < R)[None, :], other=0.0).to(DTYPE)
    b_b = b_a
    if RB > 0:
        o_b = RA + tl.arange(0, RB)
        b_b = tl.load(x + o_n[:, None] * R + o_b[None, :], mask=m_n[:, None] & (o_b < R)[None, :], other=0.0).to(DTYPE)
    return b_a, b_b


@triton.jit
def store_split(x, o_n, m_n, b_a, b_b, R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr):
    """The inverse of `load_split`, rounding to the dtype of ``x``."""
    o_a = tl.arange(0, RA)
    tl.store(x + o_n[:, None] * R + o_a[None, :], b_a.to(x.dtype.element_ty), mask=m_n[:, None] & (o_a < R)[None, :])
    if RB > 0:
        o_b = RA + tl.arange(0, RB)
        tl.store(x + o_n[:, None] * R + o_b[None, :], b_b.to(x.dtype.element_ty), mask=m_n[:, None] & (o_b < R)[None, :])


@triton.jit
def zeros_split(ROWS: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr):
    """Two float32 accumulators."""
    b_a = tl.zeros([ROWS, RA], tl.float32)
    b_b = b_a
    if RB > 0:
        b_b = tl.zeros([ROWS, RB], tl.float32)
    return b_a, b_b


@triton.jit
def dot_ranks(x_a, x_b, y_a, y_b, RB: tl.constexpr, PRECISION: tl.constexpr):
    """``x @ y.T``: the sum over the rank of ``x [M, r]`` and ``y [N, r]``."""
    acc = tl.zeros([x_a.shape[0], y_a.shape[0]], tl.float32)
    acc = dot(x_a, tl.trans(y_a), acc, PRECISION)
    if RB > 0:
        acc = dot(x_b, tl.trans(y_b), acc, PRECISION)
    return acc


@triton.jit
def dot_split(x, y_a, y_b, acc_a, acc_b, RB: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + x @ y`` for ``x [M, N]`` and ``y [N, r]``."""
    acc_a = dot(x, y_a, acc_a, PRECISION)
    if RB > 0:
        acc_b = dot(x, y_b, acc_b, PRECISION)
    return acc_a, acc_b


@triton.jit
def to_rank(
    x,  # [N, D]
    stride_x,
    o_n,
    m_n,
    weight,  # [R, D], its elements stride_r and stride_d apart
    stride_r,
    stride_d,
    D,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x @ weight.T`` for rows ``o_n``, as two float32 tiles; operands are rounded to DTYPE."""
    o_a = tl.arange(0, RA)
    acc_a, acc_b = zeros_split(o_n.shape[0], RA, RB)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_x = tl.load(x + o_n[:, None] * stride_x + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0).to(DTYPE)
        p_w = weight + o_d[:, None] * stride_d
        b_w = tl.load(p_w + o_a[None, :] * stride_r, mask=m_d[:, None] & (o_a < R)[None, :], other=0.0).to(DTYPE)
        acc_a = dot(b_x, b_w, acc_a, PRECISION)
        if RB > 0:
            o_b = RA + tl.arange(0, RB)
            b_w = tl.load(p_w + o_b[None, :] * stride_r, mask=m_d[:, None] & (o_b < R)[None, :], other=0.0).to(DTYPE)
            acc_b = dot(b_x, b_w, acc_b, PRECISION)
    return acc_a, acc_b


@triton.jit
def from_rank(
    h_a,  # [M, RA]
    h_b,  # [M, RB]
    o_d,
    weight,  # [D, R], its elements stride_d and stride_r apart
    stride_r,
    stride_d,
    D,
    R: tl.constexpr,
    RA: tl.constexpr,
    RB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Channels ``o_d`` of ``h @ weight.T``, float32; the weights are rounded to the dtype of ``h``."""
    o_a = tl.arange(0, RA)
    m_d = o_d < D
    p_w = weight + o_d[None, :] * stride_d
    b_w = tl.load(p_w + o_a[:, None] * stride_r, mask=(o_a < R)[:, None] & m_d[None, :], other=0.0).to(h_a.dtype)
    acc = dot(h_a, b_w, tl.zeros([h_a.shape[0], o_d.shape[0]], tl.float32), PRECISION)
    if RB > 0:
        o_b = RA + tl.arange(0, RB)
        b_w = tl.load(p_w + o_b[:, None] * stride_r, mask=(o_b < R)[:, None] & m_d[None, :], other=0.0).to(h_b.dtype)
        acc = dot(h_b, b_w, acc, PRECISION)
    return acc


@triton.jit
def load_vector_split(x, R: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr):
    """A bias ``[R]`` as two float32 rows."""
    o_a = tl.arange(0, RA)
    b_a = tl.load(x + o_a, mask=o_a < R, other=0.0).to(tl.float32)
    b_b = b_a
    if RB > 0:
        o_b = RA + tl.arange(0, RB)
        b_b = tl.load(x + o_b, mask=o_b < R, other=0.0).to(tl.float32)
    return b_a, b_b
