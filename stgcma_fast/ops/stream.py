"""Running a frozen step piece by piece on the CPU, so that its wide intermediates never leave the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linear import input_gradient, linear

# Bytes of the widest intermediate of one piece. A few MB share the last-level cache with the weights; larger buffers are also
# given back to the system after each use, and every page of the next one faults again (measured on window attention of Swin-L's
# first stage: 20 frames take 191 ms at once, 46 ms one by one).
PIECE_BYTES = 16 * 2**20


class _Stream(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx,
        step: Callable[..., Tensor],
        tail: tuple[Tensor, Tensor] | None,
        dim: int,
        size: int,
        x: Tensor,
        along: Tensor | None,
        *shared: Tensor,
    ) -> Tensor:
        ctx.step, ctx.tail, ctx.dim, ctx.size = step, tail, dim, size
        ctx.save_for_backward(x, along, *shared)
        out = None
        for piece, start in _pieces(x, dim, size):
            y = step(piece, _narrow(along, dim, start, size), *shared)
            y = y if tail is None else linear(y, *tail)
            out = torch.empty(x.shape, dtype=y.dtype) if out is None else out
            _narrow(out, dim, start, size).copy_(y)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, along, *shared = ctx.saved_tensors
        needs_x, needs_shared = ctx.needs_input_grad[4], ctx.needs_input_grad[6:]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        shared = [t.detach().requires_grad_(needed) for t, needed in zip(shared, needs_shared, strict=True)]
        trained = [t for t in shared if t.requires_grad]
        totals: list[Tensor] | None = None
        for piece, start in _pieces(x, ctx.dim, ctx.size):
            piece = piece.detach().requires_grad_(needs_x)
            with torch.enable_grad():
                y = ctx.step(piece, _narrow(along, ctx.dim, start, ctx.size), *shared)
            grad_y = _narrow(grad, ctx.dim, start, ctx.size)
            if ctx.tail is not None:
                grad_y = input_gradient(grad_y.to(ctx.tail[0].dtype), ctx.tail[0]).to(y.dtype)
            grads = torch.autograd.grad(y, [piece, *trained] if needs_x else trained, grad_y)
            if needs_x:
                _narrow(grad_x, ctx.dim, start, ctx.size).copy_(grads[0])
                grads = grads[1:]
            if totals is None:
                # Many pieces' gradients are summed up: in float32 at least.
                totals = [torch.zeros_like(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
            for total, g in zip(totals, grads, strict=True):
                total.add_(g)
        totals = iter(totals or ())
        grad_shared = (next(totals).to(t.dtype) if t.requires_grad else None for t in shared)
        return None, None, None, None, grad_x, None, *grad_shared


def _narrow(x: Tensor | None, dim: int, start: int, size: int) -> Tensor | None:
    return None if x is None else x.narrow(dim, start, min(size, x.shape[dim] - start))


def _pieces(x: Tensor, dim: int, size: int) -> list[tuple[Tensor, int]]:
    return [(_narrow(x, dim, start, size), start) for start in range(0, x.shape[dim], size)]


def piece_size(x: Tensor, dim: int, widening: int) -> int | None:
    """How many indices along ``dim`` make a piece; None where the whole tensor should be worked on at once.

    Args:
        x: ``[..., D]``.
        dim: the dimension to cut.
        widening: width of the step's widest intermediate, in multiples of D.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    size = max(1, PIECE_BYTES * x.shape[dim] // (x.numel() * x.element_size() * widening))
    return size if size < x.shape[dim] else None


def stream(
    step: Callable[..., Tensor],
    x: Tensor,
    *shared: Tensor,
    dim: int,
    size: int,
    tail: tuple[Tensor, Tensor] | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """``linear(step(x, along, *shared), *tail)``, piece by piece along ``dim``; same shape as ``x``.

    Nothing but the inputs is kept for the backward, which runs ``step`` again on one piece at a time. ``tail`` is frozen and is
    not run again. First-order gradients flow to ``x`` and ``shared`` alone; whatever else ``step`` reads must be frozen, and
    must not be changed between forward and backward.

    Args:
        step: a function that works on each index of ``dim`` by itself.
        x: the tensor to cut.
        shared: tensors every piece needs, and which may be trained.
        dim: the dimension to cut.
        size: indices a piece.
        tail: weight and bias of a frozen last linear layer, or None.
        along: a constant tensor to cut together with ``x``, or None.
    """
    return _Stream.apply(step, tail, dim, size, x, along, *shared)
