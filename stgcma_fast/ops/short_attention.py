"""Attention of short sequences on the CPU: PyTorch's fused forward, and a backward in batched products.

PyTorch's own fused backward takes blocks of a sequence one by one. For the 49 tokens of a window, in bfloat16 on a processor
with AMX, that was nine times as slow as whole matrices of scores (docs/performance.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Most tokens for which the batched products were faster where it was measured.
_LONGEST = {torch.bfloat16: 1024, torch.float32: 64}


def is_short(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the batched backward is the faster one for sequences of so many tokens."""
    return device.type == "cpu" and tokens <= _LONGEST.get(dtype, 0)


def softmax_gradient(grad: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of scores from that of their softmax over the last dimension."""
    return torch.ops.aten._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, bias)
        ctx.scale = scale
        return _fused(qkv, bias, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _backward(grad, *ctx.saved_tensors, ctx.scale), None, None


# An operator of its own, so that the compiler, which would bind the number of groups, does not look inside.
@torch.library.custom_op("stgcma_fast::short_attention_bwd", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    groups, length, _, heads, width = qkv.shape

    def batched(x: Tensor) -> Tensor:  # [G, L, h, d] -> [G * h, L, d]
        return x.transpose(1, 2).reshape(groups * heads, length, width)

    with torch.autocast("cpu", enabled=False):
        query, key, value, grad = *map(batched, qkv.unbind(2)), batched(grad.unflatten(-1, (heads, width)))
        query = query * scale
        if bias is None:
            scores = torch.bmm(query, key.mT)
        else:
            bias = bias.expand(groups, heads, length, length)
            scores = torch.baddbmm(bias.reshape(groups * heads, length, length), query, key.mT)
        p = scores.softmax(-1)
        d_scores = softmax_gradient(torch.bmm(grad, value.mT), p)
        gradients = torch.bmm(d_scores, key).mul_(scale), torch.bmm(d_scores.mT, query), torch.bmm(p.mT, grad)
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for part, gradient in zip(d_qkv.unbind(2), gradients, strict=True):
        part.copy_(gradient.view(groups, heads, length, width).transpose(1, 2))
    return d_qkv


_backward.register_fake(lambda grad, qkv, bias, scale: qkv.new_empty(qkv.shape))


def _fused(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [G, h, L, d] each
    if bias is not None:
        bias = bias.expand(qkv.shape[0], *bias.shape[1:])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)


def attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale q k^T + bias) v`` in each of G groups.

    Args:
        qkv: ``[G, L, 3, h, d]``, any strides.
        bias: ``[G, h, L, L]``, or 1 in the place of G; None for none.
        scale: factor of the scores.

    Returns:
        ``[G, L, h * d]``.
    """
    trained = bias is not None and bias.requires_grad
    if is_short(qkv.device, qkv.dtype, qkv.shape[1]) and qkv.requires_grad and torch.is_grad_enabled() and not trained:
        return _Attention.apply(qkv, bias, scale)
    return _fused(qkv, bias, scale)
