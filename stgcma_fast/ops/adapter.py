"""The bottleneck adapter. Card: docs/ops/adapter.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.adapter import AdapterParams
from .boundary import define
from .checks import check_adapter, check_alike, check_shape
from .dispatch import TRITON_DTYPES, Impl, Implementation, product_dtype, register, select
from .linear import linear

LARGEST_RANK = 128


def adapter(
    x: Tensor,
    params: AdapterParams,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """``residual + scale (gelu(x W_d^T + b_d) W_u^T + b_u)``, equations 2, 6 and 7; no sum where ``residual`` is None.

    Args:
        x: ``[..., D]``, any floating dtype.
        params: ``down_weight [r, D]``, ``down_bias [r]``, ``up_weight [D, r]``, ``up_bias [D]``.
        residual: ``[..., D]`` or None.
        scale: ``[..., 1]``, with ones where it is the same for all, or None for 1: stochastic depth. It gets no gradient.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[..., D]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    return adapters([x], [params], [residual], [scale], impl=impl)[0]


def adapters(
    xs: Sequence[Tensor],
    params: Sequence[AdapterParams],
    residuals: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    *,
    impl: Impl = "auto",
) -> list[Tensor]:
    """`adapter` of one or two streams, each with weights of its own; Triton serves both in one launch."""
    for x, p, residual, scale in zip(xs, params, residuals, scales, strict=True):
        check_adapter("params", p, x.shape[-1])
        if residual is not None:
            check_shape("residual", residual, *x.shape)
        if scale is not None:
            _check_scale(scale, x)
        check_alike("adapter", x=x, **p._asdict())
    calls = list(zip(xs, params, residuals, scales, strict=True))
    serving = [select("adapter", impl, *call) for call in calls]
    kinds = {(x.shape[-1], x.dtype, p.down_bias.shape, None if r is None else r.dtype, s is None) for x, p, r, s in calls}
    if len(kinds) == 1 and len(calls) <= 2 and all(function is _triton for function in serving):
        return _together(xs, params, residuals, scales)
    return [function(*call) for function, call in zip(serving, calls, strict=True)]


def _check_scale(scale: Tensor, x: Tensor) -> None:
    fits = scale.ndim == x.ndim and scale.shape[-1] == 1
    if not fits or any(n not in (1, size) for n, size in zip(scale.shape, x.shape, strict=True)):
        raise ValueError(f"scale: expected {[*x.shape[:-1], 1]}, or ones in it, got {list(scale.shape)}")
    if scale.requires_grad:
        raise ValueError("scale: got a tensor that requires a gradient, expected a constant")


def down(x: Tensor, params: AdapterParams) -> Tensor:
    """``gelu(x W_d^T + b_d)``."""
    return F.gelu(linear(x, params.down_weight, params.down_bias))


def up(hidden: Tensor, params: AdapterParams) -> Tensor:
    """``h W_u^T + b_u``."""
    return linear(hidden, params.up_weight, params.up_bias)


def _torch(x: Tensor, params: AdapterParams, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    y = up(down(x, params), params)
    y = y if scale is None else y * scale
    return y if residual is None else residual + y


def _fwd_fake(xs, residuals, scales, down_weights, down_biases, up_weights, up_biases, dtype):
    wide = torch.promote_types(dtype, residuals[0].dtype) if residuals else dtype
    return [x.new_empty(x.shape, dtype=wide) for x in xs]


_WEIGHTS = "Tensor[] down_weights, Tensor[] down_biases, Tensor[] up_weights"
_fwd = define(
    "adapter",
    f"adapter_fwd(Tensor[] xs, Tensor[] residuals, Tensor[] scales, {_WEIGHTS}, Tensor[] up_biases, ScalarType dtype)"
    " -> Tensor[]",
    _fwd_fake,
)


def _bwd_fake(grads, xs, scales, down_weights, down_biases, up_weights, needs_x, needs_weights, dtype):
    return packed_rows_fake(xs, needs_x), packed_weights_fake(xs, down_weights) if needs_weights else []


def packed_rows_fake(xs: Sequence[Tensor], needed: bool) -> Tensor:
    """The gradients of ``[..., D]`` inputs as packed rows, unwritten."""
    # Not `shape[:-1].numel()`, which would make a constant of a symbolic batch size.
    return xs[0].new_empty(sum(x.numel() // x.shape[-1] for x in xs) if needed else 0, xs[0].shape[-1])


def unpack_rows(packed: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """Packed rows in the shapes of ``xs``."""
    parts = packed.split([x.numel() // x.shape[-1] for x in xs])
    return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]


def packed_weights_fake(xs: Sequence[Tensor], down_weights: Sequence[Tensor]) -> list[Tensor]:
    """What `unpack_weight_grads` takes, unwritten."""
    rank, channels = down_weights[0].shape
    return [xs[0].new_empty(len(xs), rank * channels + bias, dtype=torch.float32) for bias in (channels, rank)]


def unpack_weight_grads(packed: Sequence[Tensor], params: Sequence[AdapterParams]) -> list[AdapterParams]:
    """Gradients in the weights' shapes and dtypes from the kernels' flat ones: up, then down, a row for each stream."""
    out = []
    for up_grad, down_grad, p in zip(*packed, params, strict=True):
        split = p.down_weight.numel()
        grads = (
            down_grad[:split].view_as(p.down_weight),
            down_grad[split:],
            up_grad[:split].view_as(p.up_weight),
            up_grad[split:],
        )
        out.append(AdapterParams(*(grad.to(weight.dtype) for grad, weight in zip(grads, p, strict=True))))
    return out


_bwd = define(
    "adapter",
    f"adapter_bwd(Tensor[] grads, Tensor[] xs, Tensor[] scales, {_WEIGHTS}, bool needs_x, bool needs_weights, ScalarType dtype)"
    " -> (Tensor, Tensor[])",
    _bwd_fake,
)


class _Adapters(torch.autograd.Function):
    """Inputs by stream: ``xs``, ``residuals`` and ``scales`` (None or tensors), then the four weights of each."""

    @staticmethod
    def forward(ctx, streams: int, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        xs, residuals, scales = (tensors[i * streams : (i + 1) * streams] for i in range(3))
        params = [AdapterParams(*tensors[i : i + 4]) for i in range(3 * streams, len(tensors), 4)]
        added, scaled = ([] if each[0] is None else list(each) for each in (residuals, scales))
        outs = _fwd(list(xs), added, scaled, *(list(weights) for weights in zip(*params, strict=True)), dtype)
        ctx.streams, ctx.dtype, ctx.residual_dtypes = streams, dtype, [r.dtype for r in added]
        ctx.save_for_backward(*xs, *scales, *(weight for p in params for weight in p))
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, saved = ctx.streams, ctx.saved_tensors
        xs, scales = saved[:streams], saved[streams : 2 * streams]
        params = [AdapterParams(*saved[i : i + 4]) for i in range(2 * streams, len(saved), 4)]
        needs = ctx.needs_input_grad[2:]
        needs_x, needs_weights = any(needs[:streams]), any(needs[3 * streams :])
        dx, packed = None, []
        if needs_x or needs_weights:
            weights = [list(each) for each in zip(*params, strict=True)][:3]
            scaled = [] if scales[0] is None else list(scales)
            dx, packed = _bwd(list(grads), list(xs), scaled, *weights, needs_x, needs_weights, ctx.dtype)
        dresiduals = [grad.to(dtype) for grad, dtype in zip(grads, ctx.residual_dtypes, strict=False)]
        weight_grads = [g for p in unpack_weight_grads(packed, params) for g in p] if needs_weights else [None] * 4 * streams
        return (
            None,
            None,
            *(unpack_rows(dx, xs) if needs_x else [None] * streams),
            *(dresiduals or [None] * streams),
            *[None] * streams,
            *weight_grads,
        )


def _together(
    xs: Sequence[Tensor],
    params: Sequence[AdapterParams],
    residuals: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
) -> list[Tensor]:
    rows = [x.reshape(-1, x.shape[-1]) for x in xs]
    added = [None if r is None else r.reshape(-1, r.shape[-1]) for r in residuals]
    # Contiguous, as the kernels read them: expanded by `reshape` alone, a single number is a view of stride 0.
    scaled = [
        None if s is None else s.expand(*x.shape[:-1], 1).reshape(-1).contiguous() for x, s in zip(xs, scales, strict=True)
    ]
    weights = [weight for p in params for weight in p]
    outs = _Adapters.apply(len(xs), product_dtype(xs[0]), *rows, *added, *scaled, *weights)
    return [out.view(x.shape) for out, x in zip(outs, xs, strict=True)]


def _triton(x: Tensor, params: AdapterParams, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    return _together([x], [params], [residual], [scale])[0]


def adapter_limits(params: Sequence[AdapterParams], residuals: Sequence[Tensor | None]) -> Iterator[str]:
    """Why the kernels cannot take these adapters or residuals."""
    for residual in residuals:
        if residual is not None and residual.dtype not in TRITON_DTYPES:
            yield f"its kernels take residuals of float32, bfloat16 and float16, got {residual.dtype}"
    for p in params:
        if len(p.down_bias) > LARGEST_RANK:
            yield f"its kernels take a bottleneck width of at most {LARGEST_RANK}, got {len(p.down_bias)}"


def _limits(x: Tensor, params: AdapterParams, residual: Tensor | None = None, scale: Tensor | None = None) -> Iterator[str]:
    yield from adapter_limits([params], [residual])


register("adapter", triton=Implementation(_triton, _limits), torch=_torch, reference=reference.adapter)
