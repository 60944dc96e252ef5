"""The windowed self-attention of Swin transformers. Card: docs/ops/window_attention.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from ..reference.windows import WindowGrid, shift_mask
from .av_adapter import check_window_grid
from .boundary import define
from .checks import check_alike, check_shape
from .dispatch import TRITON_DTYPES, Impl, Implementation, product_dtype, register, select
from .short_attention import attention
from .windows import window_partition, window_reverse

WIDEST_HEAD = 128


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    *,
    window: int,
    shift: int,
    scale: float,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``softmax(scale q k^T + bias + mask) v`` inside each window of each frame, on the image layout.

    Args:
        qkv: ``[F, H, W, 3, h, d]``, any floating dtype.
        bias: ``[h, window**2, window**2]``, relative position bias.
        window: side of a window in tokens; H and W are multiples of it.
        shift: cyclic shift of the windows; with it tokens from opposite borders are masked by -100.
        scale: factor of the scores, normally ``d ** -0.5``.
        mask: ``[windows, window**2, window**2]``, the mask of this shift where the caller has it at hand.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[F, H, W, h * d]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    check_shape("qkv", qkv, "F", "H", "W", 3, "h", "d")
    _, height, width, _, heads, _ = qkv.shape
    check_window_grid(WindowGrid(height, width, window, shift))
    check_shape("bias", bias, heads, window**2, window**2)
    if mask is not None:
        check_shape("mask", mask, (height // window) * (width // window), window**2, window**2)
    check_alike("window_attention", qkv=qkv, bias=bias)
    options = {"window": window, "shift": shift, "scale": scale, "mask": mask}
    return select("window_attention", impl, qkv, bias, **options)(qkv, bias, **options)


def _torch(qkv: Tensor, bias: Tensor, *, window: int, shift: int, scale: float, mask: Tensor | None = None) -> Tensor:
    frames, height, width, *_ = qkv.shape
    windows = window_partition(qkv.to(product_dtype(qkv)), window, shift)  # [F, windows, L, 3, h, d]
    bias = bias.to(windows.dtype)[None]
    if shift:
        mask = shift_mask(height, width, window, shift) if mask is None else mask
        bias = (bias + mask.to(bias)[:, None]).repeat(frames, 1, 1, 1)
    out = attention(windows.flatten(0, 1), bias, scale)
    return window_reverse(out.unflatten(0, (frames, -1)), height, width, window, shift)


_fwd = define(
    "window_attention",
    "window_attention_fwd(Tensor qkv, Tensor bias, int window, int shift, float scale) -> Tensor",
    lambda qkv, bias, window, shift, scale: qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]),
)
_bwd = define(
    "window_attention",
    "window_attention_bwd(Tensor grad, Tensor qkv, Tensor bias, int window, int shift, float scale) -> Tensor",
    lambda grad, qkv, bias, window, shift, scale: qkv.new_empty(qkv.shape),
)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, window: int, shift: int, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, bias)
        ctx.options = window, shift, scale
        return _fwd(qkv, bias, window, shift, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _bwd(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


def _limits(qkv: Tensor, bias: Tensor, *, window: int, shift: int, scale: float, mask: Tensor | None = None) -> Iterator[str]:
    if torch.is_grad_enabled() and bias.requires_grad:
        yield "its kernel gives the bias no gradient, and it is trained"
    if bias.dtype not in TRITON_DTYPES:
        yield f"its kernel takes a bias in float32, bfloat16 and float16, got {bias.dtype}"
    if qkv.shape[-1] > WIDEST_HEAD:
        yield f"its kernel takes up to {WIDEST_HEAD} channels a head, got {qkv.shape[-1]}"


def _triton(qkv: Tensor, bias: Tensor, *, window: int, shift: int, scale: float, mask: Tensor | None = None) -> Tensor:
    # The mask is that of the shift, which the kernel works out.
    return _WindowAttention.apply(qkv.to(product_dtype(qkv)), bias.contiguous(), window, shift, scale)


register(
    "window_attention",
    triton=Implementation(_triton, _limits),
    torch=_torch,
    reference=reference.window_attention,
)
