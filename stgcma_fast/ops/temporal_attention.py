"""Attention over time at each token position. Card: docs/ops/temporal_attention.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import reference
from .boundary import define
from .checks import check_alike, check_shape
from .dispatch import Impl, Implementation, product_dtype, register, select

# A tile holds all channels of a head, and all frames of a site.
MAX_HEAD_DIM = 128
MAX_FRAMES = 64


def temporal_attention(qkv: Tensor, bias: Tensor | None, *, scale: float, impl: Impl = "auto") -> Tensor:
    """``softmax(scale q k^T + bias) v`` over T, for every site and head, equations 6 and 7.

    Args:
        qkv: ``[B, T, S, 3, h, d]``, any floating dtype and strides.
        bias: ``[h, T, T]``, trainable, or None.
        scale: factor of the scores, normally ``d ** -0.5``.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[B, T, S, h * d]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    return temporal_attentions([qkv], [bias], scale=scale, impl=impl)[0]


def temporal_attentions(
    qkvs: Sequence[Tensor], biases: Sequence[Tensor | None], *, scale: float, impl: Impl = "auto"
) -> list[Tensor]:
    """`temporal_attention` of one or two streams of the same heads, each with a bias of its own or all with none.

    Triton leaves the gradients of qkv packed, one stream behind the other.
    """
    for qkv, bias in zip(qkvs, biases, strict=True):
        check_shape("qkv", qkv, "B", "T", "S", 3, "h", "d")
        if bias is not None:
            check_shape("bias", bias, qkv.shape[4], qkv.shape[1], qkv.shape[1])
        check_alike("temporal_attention", qkv=qkv, bias=bias)
    calls = list(zip(qkvs, biases, strict=True))
    serving = [select("temporal_attention", impl, *call, scale=scale) for call in calls]
    if len(calls) <= 2 and all(function is _triton for function in serving):
        return _together(qkvs, biases, scale)
    return [function(*call, scale=scale) for function, call in zip(serving, calls, strict=True)]


_fwd = define(
    "temporal_attention",
    "temporal_attention_fwd(Tensor[] qkvs, Tensor?[] biases, float scale) -> Tensor[]",
    lambda qkvs, biases, scale: [x.new_empty(*x.shape[:3], x.shape[4] * x.shape[5]) for x in qkvs],
)


def _bwd_fake(grads, qkvs, biases, scale, qkv_grad, bias_grad):
    rows = sum(x.shape[0] * x.shape[1] * x.shape[2] for x in qkvs) if qkv_grad else 0
    return qkvs[0].new_empty(rows, *qkvs[0].shape[3:]), [x.new_empty(x.shape) for x in biases] if bias_grad else []


_bwd = define(
    "temporal_attention",
    "temporal_attention_bwd(Tensor[] grads, Tensor[] qkvs, Tensor?[] biases, float scale, bool qkv_grad, bool bias_grad)"
    " -> (Tensor, Tensor[])",
    _bwd_fake,
)


class _TemporalAttention(torch.autograd.Function):
    """qkv of one or two streams, then the bias of each."""

    # No `*tensors`: see _LayerNorm.
    @staticmethod
    def forward(
        ctx, scale: float, qkv: Tensor, other_qkv: Tensor | None, bias: Tensor | None, other_bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        streams = 1 if other_qkv is None else 2
        ctx.save_for_backward(qkv, other_qkv, bias, other_bias)
        ctx.scale = scale
        return tuple(_fwd([qkv, other_qkv][:streams], [bias, other_bias][:streams], scale))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, saved, needs = len(grads), ctx.saved_tensors, ctx.needs_input_grad[1:]
        qkvs, biases = list(saved[:streams]), list(saved[2 : 2 + streams])
        wanted = any(needs[:2]), any(needs[2:])
        packed, dbiases = _bwd(list(grads), qkvs, biases, ctx.scale, *wanted)
        dqkvs = []
        if wanted[0]:
            parts = packed.split([x.shape[:3].numel() for x in qkvs])
            dqkvs = [part.view(x.shape) for part, x in zip(parts, qkvs, strict=True)]
        return None, *dqkvs, *[None] * (2 - len(dqkvs)), *dbiases, *[None] * (2 - len(dbiases))


def _limits(qkv: Tensor, bias: Tensor | None, *, scale: float) -> Iterator[str]:
    frames, head_dim = qkv.shape[1], qkv.shape[5]
    dtype = product_dtype(qkv)
    if head_dim > MAX_HEAD_DIM:
        yield f"its kernels take heads of at most {MAX_HEAD_DIM} channels, got {head_dim}"
    # Exact float32 products of larger tiles do not fit the registers.
    most = (32 if head_dim <= 64 else 16) if dtype == torch.float32 else MAX_FRAMES
    if frames > most:
        yield f"its kernels take at most {most} frames of {head_dim} channels in {dtype}, got {frames}"


def _together(qkvs: Sequence[Tensor], biases: Sequence[Tensor | None], scale: float) -> list[Tensor]:
    # Under autocast as its products; the bias stays as it is and is added in float32.
    work = product_dtype(qkvs[0])
    pair = [qkv.to(work) for qkv in qkvs]
    missing = [None] * (2 - len(pair))
    return list(_TemporalAttention.apply(scale, *pair, *missing, *biases, *missing))


def _triton(qkv: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    return _together([qkv], [bias], scale)[0]


register(
    "temporal_attention",
    triton=Implementation(_triton, _limits),
    # Scores are T x T, ten by ten: without a kernel of its own there is nothing to save by PyTorch's fused attention, which
    # gives the bias no gradient.
    torch=reference.temporal_attention,
    reference=reference.temporal_attention,
)
