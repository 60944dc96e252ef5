"""One transformer block for both streams and both backbones: temporal, spatial, global.

The parameters live in the modules of `reference.model`; this file is the fast way through them. Each frozen layer runs once,
on the tokens of all streams packed behind one another. On the CPU, where wide tensors cost more than launches, it runs on one
cache-sized piece of a stream at a time instead.

Shapes: B clips, T frames, S tokens of a frame, D channels, F = B * T, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import ops
from .ops.dispatch import Impl
from .ops.linear import linear
from .ops.stream import piece_size, stream
from .reference.adapter import AdapterParams
from .reference.model import Block

Affine = tuple[Tensor, Tensor]
Streams = dict[str, Tensor]


class FrozenLayers(NamedTuple):
    """The frozen weights of a block under one set of names for both backbones."""

    norm1: Affine
    qkv: Affine
    proj: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine
    heads: int
    activation: Callable[[Tensor], Tensor]
    # Attention within each frame: [F, S, 3, h, d] to [F, S, h * d].
    attention: Callable[[Tensor], Tensor]
    # Temporal bias [h, T, T] of a stream, or None.
    temporal_bias: Callable[[str], Tensor | None]
    # Shape of the mask that drops the temporal residual, for tokens [B, T, S, D].
    drop_shape: Callable[[Tensor], tuple[int, ...]]
    # Whatever else `attention` reads.
    tables: tuple[Tensor, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether somebody trains a layer that the paper freezes."""
        return any(t.requires_grad for pair in (*self[:6], self.tables) for t in pair)


class Runner(NamedTuple):
    """How a model runs its blocks; the meaning is that of `FastSTGCMA`'s arguments."""

    impl: Impl
    fold_temporal: bool
    checkpointing: bool


def _pack(xs: Sequence[Tensor]) -> Tensor:
    """Tensors ``[..., D]`` to one ``[rows, D]``, one behind the other."""
    return torch.cat([x.flatten(0, -2) for x in xs]) if len(xs) > 1 else xs[0].flatten(0, -2)


def _unpack(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_pack`, to the leading shapes of ``like``."""
    parts = rows.split([x.shape[:-1].numel() for x in like]) if len(like) > 1 else [rows]
    return [part.view(*x.shape[:-1], -1) for part, x in zip(parts, like, strict=True)]


def _fold(params: AdapterParams, proj: Affine) -> AdapterParams:
    """Merge the frozen projection before an adapter into its down-projection: ``W_d (P o + b_p) + b_d``."""
    weight, bias = proj
    down = params.down_weight
    return params._replace(down_weight=down @ weight, down_bias=down @ bias + params.down_bias)


def _drop_mask(block: Block, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Stochastic depth of the temporal residual; the same random numbers as the reference draws."""
    if not block.training or block.drop_rate == 0:
        return None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    keep = 1 - block.drop_rate
    return torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(keep).div_(keep)


def _qkv(layers: FrozenLayers, xs: Sequence[Tensor], impl: Impl) -> list[Tensor]:
    """``[..., D]`` each to ``[..., 3, h, d]``."""
    normed = _pack([ops.layer_norm(x, *layers.norm1, impl=impl) for x in xs])
    return [y.unflatten(-1, (3, layers.heads, -1)) for y in _unpack(linear(normed, *layers.qkv), xs)]


def _temporal(block: Block, layers: FrozenLayers, streams: Streams, runner: Runner) -> Streams:
    """``X_t <- X_t + DropPath(TAdapter(MHSA_T(LN(X_t))))``, equations 6 and 7."""
    adapted = [m for m in streams if m in block.config.adapt]
    masks = {m: _drop_mask(block, streams[m], layers.drop_shape(streams[m])) for m in adapted}
    biases = {m: layers.temporal_bias(m) for m in adapted}
    params: dict[str, AdapterParams | None] = dict.fromkeys(adapted)
    if block.config.use_temporal:
        params = {m: block.adapter_params("T_Adapter", m) for m in adapted}
        if runner.fold_temporal:
            params = {m: _fold(p, layers.proj) for m, p in params.items()}

    def finish(x: Tensor, qkv: Tensor, mask: Tensor | None, bias: Tensor | None, weights: AdapterParams | None) -> Tensor:
        attended = ops.temporal_attention(qkv, bias, scale=qkv.shape[-1] ** -0.5, impl=runner.impl)
        if weights is None or not runner.fold_temporal:
            attended = linear(attended, *layers.proj)
        if weights is not None and mask is None:
            return ops.adapter(attended, weights, x, impl=runner.impl)
        y = attended if weights is None else ops.adapter(attended, weights, impl=runner.impl)
        return x + (y if mask is None else y * mask)

    def piece(x: Tensor, mask: Tensor | None, *shared: Tensor) -> Tensor:
        used = 4 * block.config.use_temporal
        weights, bias = shared[:used], shared[used:]
        (qkv,) = _qkv(layers, [x], runner.impl)
        return finish(x, qkv, mask, bias[0] if bias else None, AdapterParams(*weights) if weights else None)

    streams = dict(streams)
    size = None if layers.trained else piece_size(streams[adapted[0]], 2, 3)
    if size is None:
        xs = [streams[m] for m in adapted]
        qkvs = _qkv(layers, xs, runner.impl)
        done = {m: finish(x, qkv, masks[m], biases[m], params[m]) for m, x, qkv in zip(adapted, xs, qkvs, strict=True)}
        return streams | done
    for m in adapted:
        shared = [*(params[m] or ()), *([] if biases[m] is None else [biases[m]])]
        streams[m] = stream(piece, streams[m], *shared, dim=2, size=size, along=masks[m])
    return streams


def _frozen_step(
    inner: Callable[[Sequence[Tensor]], Tensor], tail: Affine, streams: Streams, widening: int, trained: bool
) -> Streams:
    """``linear(inner(xs), *tail)``: all streams packed, or one piece of a stream at a time. ``inner`` gives packed rows."""
    xs = list(streams.values())
    size = None if trained else piece_size(xs[0], 0, widening)
    if size is None:
        ys = _unpack(linear(inner(xs), *tail), xs)
    else:
        ys = [stream(lambda x, _: _unpack(inner([x]), [x])[0], x, dim=0, size=size, tail=tail) for x in xs]
    return dict(zip(streams, ys, strict=True))


def spatial_step(layers: FrozenLayers, streams: Streams, runner: Runner) -> Streams:
    """``X_med = MHSA(LN(X_s))``, equations 8 and 9, for streams ``[F, S, D]``."""

    def inner(xs: Sequence[Tensor]) -> Tensor:
        return _pack([layers.attention(qkv) for qkv in _qkv(layers, xs, runner.impl)])

    return _frozen_step(inner, layers.proj, streams, 3, layers.trained)


def global_step(layers: FrozenLayers, streams: Streams, runner: Runner) -> Streams:
    """``X_med = FFN(LN(X))``, equations 12 and 13, for streams ``[..., D]``."""

    def inner(xs: Sequence[Tensor]) -> Tensor:
        normed = _pack([ops.layer_norm(x, *layers.norm2, impl=runner.impl) for x in xs])
        return layers.activation(linear(normed, *layers.fc1))

    rows = {m: x.flatten(0, -2) for m, x in streams.items()}
    done = _frozen_step(inner, layers.fc2, rows, 4, layers.trained)
    return {m: done[m].view_as(x) for m, x in streams.items()}


def adapt(
    block: Block, step: str, streams: Streams, medial: Streams, used: bool, runner: Runner, window: ops.WindowGrid | None = None
) -> Streams:
    """``X <- X + X_med + W_u h'``, equations 10, 11, 14 and 15, for streams ``[F, S, D]``."""
    adapted = block.config.adapt if used else ()
    if len(adapted) < 2:
        sums = {m: x + medial[m] for m, x in streams.items()}
        return {
            m: ops.adapter(medial[m], block.adapter_params(step, m), total, impl=runner.impl) if m in adapted else total
            for m, total in sums.items()
        }
    visual, audio = ops.av_adapter(
        medial["visual"],
        medial["audio"],
        block.adapter_params(step, "visual"),
        block.adapter_params(step, "audio"),
        block.gate_v,
        block.gate_a,
        residual_visual=streams["visual"],
        residual_audio=streams["audio"],
        window=window,
        fusion=block.config.fusion,
        impl=runner.impl,
    )
    return {"visual": visual, "audio": audio}


def run_block(frozen_layers: Callable[[Block, Impl], FrozenLayers], block: Block, streams: Streams, runner: Runner) -> Streams:
    """One block, streams ``[B, T, S, D]`` keyed by modality to the same. ``frozen_layers`` is the backbone's."""

    def forward(streams: Streams) -> Streams:
        return _forward(block, frozen_layers(block, runner.impl), streams, runner)

    if runner.checkpointing and torch.is_grad_enabled():
        return checkpoint(forward, streams, use_reentrant=False)
    return forward(streams)


def _forward(block: Block, layers: FrozenLayers, streams: Streams, runner: Runner) -> Streams:
    shapes = {m: x.shape for m, x in streams.items()}
    if block.has_temporal:
        streams = _temporal(block, layers, streams, runner)
    streams = {m: x.flatten(0, 1) for m, x in streams.items()}
    medial = spatial_step(layers, streams, runner)
    streams = adapt(block, block.SPATIAL, streams, medial, block.config.use_spatial, runner, block.spatial_window)
    medial = global_step(layers, streams, runner)
    if block.parallel_adapter:
        streams = {m: x + medial[m] + _parallel_adapter(block, layers, m, x, runner) for m, x in streams.items()}
    else:
        streams = adapt(block, block.GLOBAL, streams, medial, block.config.use_global, runner)
    return {m: x.view(shapes[m]) for m, x in streams.items()}


def _parallel_adapter(block: Block, layers: FrozenLayers, modality: str, x: Tensor, runner: Runner) -> Tensor:
    """The one-stream Swin's adapter beside the FFN, for ``[F, S, D]``."""
    normed = ops.layer_norm(x, *layers.norm2, impl=runner.impl)
    y = 0.5 * ops.adapter(normed, block.adapter_params(block.GLOBAL, modality), impl=runner.impl)
    mask = _drop_mask(block, x, (len(x), 1, 1))
    return y if mask is None else y * mask
