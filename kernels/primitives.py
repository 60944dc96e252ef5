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
def gelu(z):
    """Exact GELU in float32."""
    return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_grad(z):
    """Derivative of the exact GELU in float32."""
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
